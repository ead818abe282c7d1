"""Average precision as Pascal VOC defines it: at one IoU, class by class.

A detection is right if it overlaps a box of its class enough and no better detection has taken that box.
`evaluation.coco` has COCO's numbers, which are means over many IoUs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from retinanet.boxes import box_iou
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import escaped
from retinanet.inference import detect_dataset
from retinanet.postprocess import MAX_DETECTIONS, SCORE_THRESHOLD, Detections
from retinanet.process import log, show_log
from retinanet.visual import charts

VOC07_RECALLS = np.linspace(0, 1, 11) - 1e-12  # less a rounding error: a recall of 3 / 10 counts as 0.3


class ClassResult(NamedTuple):
    """How well the objects of one class were found."""

    average_precision: float  # area under its precision-recall curve, 0 to 1; 0 if nothing was found
    num_boxes: int  # of the ground truth, without the difficult ones
    precision: float  # share of its detections that are right; 0 without detections
    recall: float  # share of its boxes that were found; 0 without boxes
    curve: np.ndarray  # [2, N] recall and precision after each detection, from the best to the worst


def compute_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`boxes.box_iou` of arrays in float64, the original's interface: [N, 4] and [K, 4] xyxy -> [N, K]."""
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

    The envelope is the best precision at a recall or any higher one. VOC takes its area since 2010; VOC 2007 takes
    its mean at 11 recalls, and COCO at 101: at `recalls`. The curve is [N] recalls, rising, and [N] precisions.
    """
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if recalls is None:
        return float((np.diff(recall, prepend=0.0) * envelope).sum())
    return float(np.append(envelope, 0.0)[np.searchsorted(recall, recalls)].mean())


def evaluate_detections(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections],
    iou_threshold: float = 0.5,
    eleven_points: bool = False,
) -> dict[int, ClassResult]:
    """Score the detections of each sample index that counts, boxes in pixels of the original image, class by class.

    Finding or missing a difficult box changes no score. A box counts as found from `iou_threshold` on; `eleven_points`
    gives the average precision of VOC 2007. Returns the ClassResult of every label.
    """
    num_classes = dataset.num_classes()
    num_boxes = np.zeros(num_classes, dtype=np.int64)
    parts = [(np.zeros(0), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    for index in sorted(detections):
        order = detections[index].scores.argsort(descending=True, stable=True)
        found = Detections(*(column[order] for column in detections[index]))
        annotations = dataset.load_annotations(index)
        verdict = _judge(found, annotations, dataset.load_difficult(index), iou_threshold)
        parts.append((found.scores.numpy(), found.labels.numpy(), verdict))
        num_boxes += np.bincount(annotations[:, 4].astype(np.int64), minlength=num_classes)
    scores, labels, verdict = map(np.concatenate, zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    labels, verdict = labels[order], verdict[order]

    results = {}
    for label in range(num_classes):
        right = verdict[(labels == label) & (verdict >= 0)]
        found = np.cumsum(right)
        recall = found / max(1, num_boxes[label])
        precision = found / np.arange(1, len(found) + 1)
        results[label] = ClassResult(
            average_precision(recall, precision, VOC07_RECALLS if eleven_points else None) if num_boxes[label] else 0.0,
            int(num_boxes[label]),
            float(precision[-1]) if len(precision) else 0.0,
            float(recall[-1]) if len(recall) else 0.0,
            np.stack([recall, precision]),
        )
    return results


def mean_average_precision(results: Mapping[int, ClassResult]) -> float:
    """Mean over the classes that have boxes; 0 if none has."""
    present = [result.average_precision for result in results.values() if result.num_boxes]
    return float(np.mean(present)) if present else 0.0


def class_table(results: Mapping[int, ClassResult], dataset: DetectionDataset) -> str:
    """A line of text for each class, and their mean; a dash where a class has no boxes."""
    names = {label: escaped(name) for label, name in dataset.labels.items()}
    width = max(5, *map(len, names.values()))
    lines = [f"{'class':{width}}  VOC AP  precision  recall   boxes"]
    for label, result in results.items():
        average = f"{result.average_precision:.3f}" if result.num_boxes else "-"
        lines.append(
            f"{names[label]:{width}}  {average:>6}  {result.precision:9.3f}  {result.recall:6.3f}  "
            f"{result.num_boxes:6d}"
        )
    return "\n".join([*lines, f"mAP {mean_average_precision(results):.4f}"])


def evaluate(
    generator: DetectionDataset,
    retinanet: nn.Module,
    iou_threshold: float = 0.5,
    score_threshold: float = SCORE_THRESHOLD,
    max_detections: int = MAX_DETECTIONS,
    save_path: str | Path | None = None,
) -> dict[int, tuple[float, int]]:
    """Run a model over a data set and log each class's scores and mAP; the original's interface.

    The model keeps its mode.

    Args:
        generator: the data set, with a Resizer among its transforms.
        retinanet: the model, or a DataParallel around it.
        iou_threshold: IoU from which a box counts as found.
        score_threshold: scores must be above it.
        max_detections: detections an image.
        save_path: folder for the precision-recall curves, `pr_curves.png`; needs matplotlib.

    Returns:
        Average precision and number of boxes of each label.
    """
    show_log()
    if save_path is not None:
        Path(save_path).mkdir(parents=True, exist_ok=True)
    limits = {"score_threshold": score_threshold, "max_detections": max_detections}
    results = evaluate_detections(generator, detect_dataset(retinanet, generator, **limits), iou_threshold)
    log.info("%s", class_table(results, generator))
    if save_path is not None:
        curves = {generator.label_to_name(label): result.curve for label, result in results.items()}
        charts.draw_curves({f"IoU {iou_threshold:g}": curves}, Path(save_path) / "pr_curves.png")
    return {label: (result.average_precision, result.num_boxes) for label, result in results.items()}
