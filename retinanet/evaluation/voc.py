"""Average precision as Pascal VOC defines it: at one IoU, class by class.

A detection is right if it overlaps a box of its class enough and no better detection has taken that box.
`evaluation.coco` computes COCO's numbers, which are means over many IoUs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from retinanet.boxes import box_iou
from retinanet.data.dataset import DetectionDataset
from retinanet.detection import detect_dataset
from retinanet.errors import shortened
from retinanet.evaluation.thresholds import Point, Ranking, at_precision, best_f1, counts_above, pooled, rates_above
from retinanet.postprocess import MAX_DETECTIONS, SCORE_THRESHOLD, Detections
from retinanet.process import log, show_log
from retinanet.visual import charts

BOARD_CLASSES = 20  # classes with a curve in TensorBoard
VOC07_RECALLS = np.linspace(0, 1, 11) - 1e-12  # allows for rounding: a recall of 3 / 10 reaches 0.3


class ClassResult(NamedTuple):
    """How well the objects of one class were found."""

    average_precision: float  # area under its precision-recall curve, 0 to 1; 0 if nothing was found
    num_boxes: int  # ground-truth boxes, without the difficult ones
    precision: float  # share of its detections that are right; 0 without detections
    recall: float  # share of its boxes that were found; 0 without boxes
    curve: np.ndarray  # [2, N] recall and precision after each detection, from the best to the worst
    ranking: Ranking  # these detections


def compute_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`boxes.box_iou` of arrays, in float64: [N, 4] and [K, 4] xyxy -> [N, K]; the original's interface."""
    return box_iou(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)).numpy()


def _judge(found: Detections, annotations: np.ndarray, difficult: np.ndarray, iou_threshold: float) -> np.ndarray:
    """[N] whether each detection of an image, best first, is right (1), wrong (0) or found a difficult box (-1)."""
    boxes = np.concatenate([annotations, difficult])
    verdict = np.zeros(len(found.scores), dtype=np.int64)
    if not len(boxes):
        return verdict
    overlap = compute_overlap(found.boxes, boxes[:, :4])
    overlap[found.labels.numpy()[:, None] != boxes[:, 4]] = -1
    best = overlap.argmax(axis=1)
    finders = np.flatnonzero(overlap.max(axis=1) >= iou_threshold)
    _, first = np.unique(best[finders], return_index=True)
    verdict[finders[first]] = 1  # only the best detection of a box is right
    verdict[finders[best[finders] >= len(annotations)]] = -1
    return verdict


def average_precision(recall: np.ndarray, precision: np.ndarray, recalls: np.ndarray | None = None) -> float:
    """Area under the envelope of a precision-recall curve, or the envelope's mean at some recalls.

    The envelope is the best precision at a recall or any higher one. VOC has used its area since 2010. VOC 2007 used
    its mean at 11 `recalls`, and COCO uses its mean at 101. The curve is [N] rising recalls and [N] precisions.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if recalls is None:
        return float((np.diff(recall, prepend=0.0) * envelope).sum())
    return float(np.append(envelope, 0.0)[np.searchsorted(recall, recalls)].mean())


def rank(dataset: DetectionDataset, detections: Mapping[int, Detections], iou_threshold: float) -> dict[int, Ranking]:
    """Find out which detections are right, as for `evaluate_detections`; returns a Ranking for every label."""
    num_classes = dataset.num_classes()
    boxes = np.zeros((num_classes, len(detections)), dtype=np.int64)
    nothing = np.zeros(0, dtype=np.int64)
    parts = [(np.zeros(0), nothing, nothing, nothing)]
    for place, index in enumerate(sorted(detections)):
        order = detections[index].scores.argsort(descending=True, stable=True)
        found = Detections(*(column[order] for column in detections[index]))
        annotations = dataset.load_annotations(index)
        verdict = _judge(found, annotations, dataset.load_difficult(index), iou_threshold)
        parts.append((found.scores.numpy(), found.labels.numpy(), verdict, np.full(len(verdict), place)))
        boxes[:, place] = np.bincount(annotations[:, 4].astype(np.int64), minlength=num_classes)
    scores, labels, verdict, images = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    order = order[verdict[order] >= 0]
    rankings = {}
    for label in range(num_classes):
        chosen = order[labels[order] == label]
        rankings[label] = Ranking(scores[chosen], verdict[chosen] == 1, images[chosen], boxes[label])
    return rankings


def evaluate_detections(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections],
    iou_threshold: float = 0.5,
    eleven_points: bool = False,
) -> dict[int, ClassResult]:
    """Score detections by sample index, boxes in pixels of the original image, class by class.

    Images without an entry do not count. Finding or missing a difficult box changes no score. A box counts as found at
    an IoU of at least `iou_threshold`; `eleven_points` computes the average precision of VOC 2007. Returns the
    ClassResult of every label.
    """
    results = {}
    for label, ranking in rank(dataset, detections, iou_threshold).items():
        found, num_boxes = np.cumsum(ranking.right), int(ranking.boxes.sum())
        curve = np.stack([found / max(1, num_boxes), found / np.arange(1, len(found) + 1)])
        recall, precision = curve[:, -1].tolist() if len(found) else (0.0, 0.0)
        average = average_precision(*curve, VOC07_RECALLS if eleven_points else None) if num_boxes else 0.0
        results[label] = ClassResult(average, num_boxes, precision, recall, curve, ranking)
    return results


def mean_average_precision(results: Mapping[int, ClassResult]) -> float:
    """Mean average precision of the classes that have boxes; 0 if none has."""
    present = [result.average_precision for result in results.values() if result.num_boxes]
    return float(np.mean(present)) if present else 0.0


def all_rankings(results: Mapping[int, ClassResult]) -> list[Ranking]:
    """The Ranking of each label, followed by that of all classes together, which share one threshold."""
    rankings = [result.ranking for result in results.values()]
    return [*rankings, pooled(rankings)]


def board_curves(results: Mapping[int, ClassResult], dataset: DetectionDataset) -> dict[str, np.ndarray]:
    """Precision-recall curves of the classes with the most boxes and of all, as `RunLog.add_pictures` takes them."""
    *classes, over_all = zip([*dataset.labels.values(), "all classes"], all_rankings(results), strict=True)
    classes.sort(key=lambda pair: -pair[1].boxes.sum())
    scores, curves = np.linspace(0, 1, 127), {}  # as many as TensorBoard's own curves have
    for name, ranking in [over_all, *classes[:BOARD_CLASSES]]:
        counts, right = counts_above(ranking, scores)
        rates = np.nan_to_num(rates_above(ranking, scores)[:2])
        curves[name] = np.stack([right, counts - right, ranking.boxes.sum() - right, *rates])
    return curves


def best_scores(results: Mapping[int, ClassResult], dataset: DetectionDataset) -> dict[str, Any]:
    """The scores of the best F1, for a checkpoint: of `all` classes and of `classes` by name; {} if none is right."""
    *points, over_all = map(best_f1, all_rankings(results))
    classes = {name: point.score for name, point in zip(dataset.labels.values(), points, strict=True) if point}
    return {"all": over_all.score, "classes": classes} if over_all else {}


def class_table(
    results: Mapping[int, ClassResult], dataset: DetectionDataset, min_precision: float | None = None
) -> str:
    """A line of text for each class and for all: average precision, and the scores of the best F1 and `min_precision`.

    A dash means that a class has no boxes, or that there is no such score.
    """
    names = [*map(shortened, dataset.labels.values()), "all"]
    width, mean, rankings = max(5, *map(len, names)), mean_average_precision(results), all_rankings(results)
    averages, points = [*(result.average_precision for result in results.values()), mean], [*map(best_f1, rankings)]
    lines = [f"{'class':{width}}  VOC AP  best F1  its score  precision  recall   boxes"]
    for name, average, point, ranking in zip(names, averages, points, rankings, strict=True):
        ap, f1 = f"{average:.3f}" if ranking.boxes.any() else "-", f"{point.f1:.3f}" if point else "-"
        lines.append(f"{name:{width}}  {ap:>6}  {f1:>7}  {_cells(point)}  {ranking.boxes.sum():6d}")
    lines.append(f"mAP {mean:.4f}")
    if over_all := points[-1]:
        lines.append(
            f"number of objects an image, at the best F1 of all: mean error {over_all.count_error:+.2f}, "
            f"mean absolute error {over_all.absolute_count_error:.2f}"
        )
    if min_precision is not None:
        lines += ["", f"lowest score with a precision of {min_precision:g}:"]
        lines.append(f"{'class':{width}}      score  precision  recall   boxes")
        for name, ranking in zip(names, rankings, strict=True):
            lines.append(f"{name:{width}}  {_cells(at_precision(ranking, min_precision))}  {ranking.boxes.sum():6d}")
    return "\n".join(lines)


def _cells(point: Point | None) -> str:
    """Score, precision and recall as columns."""
    cells = (f"{point.score:g}", f"{point.precision:.3f}", f"{point.recall:.3f}") if point else "---"
    return "{:>9}  {:>9}  {:>6}".format(*cells)


def evaluate(
    generator: DetectionDataset,
    retinanet: nn.Module,
    iou_threshold: float = 0.5,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
    save_path: str | Path | None = None,
) -> dict[int, tuple[float, int]]:
    """Run a model over a data set and log each class's scores and mAP; the original's interface.

    Args:
        generator: the data set, with a Resizer among its transforms.
        retinanet: the model, which may be wrapped in DataParallel; its mode is restored.
        iou_threshold: smallest IoU at which a box counts as found.
        score_threshold: scores must be above it.
        max_detections: detections per image.
        save_path: folder for the precision-recall curves, `pr_curves.png`; needs matplotlib.

    Returns:
        Average precision and number of boxes of each label.
    """
    show_log()
    if save_path is not None:
        Path(save_path).mkdir(parents=True, exist_ok=True)
    found = detect_dataset(retinanet, generator, score_threshold=score_threshold, max_detections=max_detections)
    results = evaluate_detections(generator, found, iou_threshold)
    log.info("%s", class_table(results, generator))
    if save_path is not None:
        curves = {generator.label_to_name(label): result.curve for label, result in results.items()}
        charts.draw_curves({f"IoU {iou_threshold:g}": curves}, Path(save_path) / "pr_curves.png")
    return {label: (result.average_precision, result.num_boxes) for label, result in results.items()}
