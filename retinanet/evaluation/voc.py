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
from retinanet.inference import detect_dataset
from retinanet.postprocess import MAX_DETECTIONS, SCORE_THRESHOLD, Detections
from retinanet.process import log, show_log
from retinanet.visual import charts

VOC07_RECALLS = np.linspace(0, 1, 11) - 1e-12  # less a rounding error: a recall of 3 / 10 counts as 0.3


class ClassResult(NamedTuple):
    """How well the objects of one class were found.

    Attributes:
        average_precision: area under its precision-recall curve, 0 to 1; 0 if nothing was found.
        num_boxes: ground-truth boxes, without the difficult ones.
        precision: share of its detections that are right; 0 without detections.
        recall: share of its boxes that were found; 0 without boxes.
        curve: [2, N] recall and precision after each detection, from the best to the worst.
    """

    average_precision: float
    num_boxes: int
    precision: float
    recall: float
    curve: np.ndarray


class _GroundTruth(NamedTuple):
    """The boxes of several images, sorted by group: the boxes of one class in one image."""

    group: np.ndarray  # [N] image index * number of classes + label
    boxes: np.ndarray  # [N, 4] xyxy
    difficult: np.ndarray  # [N] bool


def compute_overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """IoU of NumPy boxes, the original's interface of `boxes.box_iou`: [N, 4] and [K, 4] xyxy -> [N, K] float64."""
    return box_iou(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)).numpy()


def _gather_ground_truth(dataset: DetectionDataset, indices: list[int]) -> _GroundTruth:
    image = np.concatenate([dataset.image_index, dataset.difficult_image_index])
    annotations = np.concatenate([dataset.annotations, dataset.difficult_annotations])
    difficult = np.arange(len(annotations)) >= len(dataset.annotations)
    group = image * dataset.num_classes() + annotations[:, 4].astype(np.int64)
    order = np.argsort(group, kind="stable")
    order = order[np.isin(image[order], indices)]
    return _GroundTruth(group[order], annotations[order, :4], difficult[order])


def _judge(boxes: np.ndarray, group: np.ndarray, truth: _GroundTruth, iou_threshold: float) -> np.ndarray:
    """Whether each detection is right (1), wrong (0) or does not count (-1: it found a difficult box).

    All classes and images are judged at once: each detection is paired with the boxes of its group alone.

    Args:
        boxes: [N, 4], from the best score to the worst.
        group: [N] of each detection.
        truth: the boxes to find.
        iou_threshold: IoU from which a box counts as found.
    """
    first, end = np.searchsorted(truth.group, group, "left"), np.searchsorted(truth.group, group, "right")
    counts = end - first
    detection = np.repeat(np.arange(len(group)), counts)  # [pairs]
    candidate = np.arange(len(detection)) - np.repeat(np.cumsum(counts) - counts - first, counts)  # [pairs]
    iou = compute_overlap(boxes[detection, None], truth.boxes[candidate, None])[:, 0, 0]  # [pairs]
    # The candidate that each detection overlaps most; of equals, the first.
    order = np.lexsort((candidate, -iou, detection))
    judged, start = np.unique(detection[order], return_index=True)
    best, best_iou = candidate[order][start], iou[order][start]
    judged, best = judged[best_iou >= iou_threshold], best[best_iou >= iou_threshold]
    verdict = np.zeros(len(group), dtype=np.int64)
    _, taker = np.unique(best, return_index=True)  # detections are sorted: the first one that finds a box takes it
    verdict[judged[taker]] = 1
    verdict[judged[truth.difficult[best]]] = -1
    return verdict


def average_precision(recall: np.ndarray, precision: np.ndarray, recalls: np.ndarray | None = None) -> float:
    """Area under the envelope of a precision-recall curve, or the envelope's mean at some recalls.

    The envelope is the best precision at a recall or any higher one. VOC takes its area since 2010; VOC 2007 takes
    its mean at 11 recalls, and COCO at 101.

    Args:
        recall: [N] rising.
        precision: [N].
        recalls: [R] where the mean is taken; None for the area.
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
    """Score detections class by class.

    Args:
        dataset: provides the ground truth; finding or missing a difficult box changes no score.
        detections: of each sample index that counts, boxes in pixels of the original image.
        iou_threshold: IoU from which a box counts as found.
        eleven_points: average precision as in VOC 2007.

    Returns:
        The ClassResult of every label.
    """
    indices, num_classes = sorted(detections), dataset.num_classes()
    truth = _gather_ground_truth(dataset, indices)
    nothing = Detections(torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    columns = zip(nothing, *(detections[index] for index in indices), strict=True)
    scores, labels, boxes = (torch.cat(column).numpy() for column in columns)
    image = np.repeat(np.array(indices, dtype=np.int64), [len(detections[index].scores) for index in indices])
    order = np.argsort(-scores, kind="stable")
    verdict = _judge(boxes[order], (image * num_classes + labels)[order], truth, iou_threshold)
    num_boxes = np.bincount(truth.group[~truth.difficult] % num_classes, minlength=num_classes)

    results = {}
    for label in range(num_classes):
        right = verdict[(labels[order] == label) & (verdict >= 0)]
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
    width = max(5, *map(len, dataset.classes))
    lines = [f"{'class':{width}}  VOC AP  precision  recall   boxes"]
    for label, result in results.items():
        average = f"{result.average_precision:.3f}" if result.num_boxes else "-"
        lines.append(
            f"{dataset.label_to_name(label):{width}}  {average:>6}  {result.precision:9.3f}  {result.recall:6.3f}  "
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
