"""What costs AP: each kind of error, the AP that fixing it would add, and which classes are confused.

The kinds of errors, and how each is fixed, are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying
Object Detection Errors", 2020), with its thresholds: IoU 0.5 to be right, 0.1 to overlap a box at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from retinanet.boxes import box_area, box_intersection
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import shortened
from retinanet.evaluation.voc import average_precision, compute_overlap
from retinanet.postprocess import MAX_DETECTIONS, Detections

RIGHT_IOU, OVERLAP_IOU = 0.5, 0.1
CONFUSION_SCORE = 0.5  # detections above it enter the confusion matrix
COCO_RECALLS = np.linspace(0, 1, 101)  # at which COCO samples a precision-recall curve

# Kind of error -> its title and its meaning.
KINDS = {
    "class": ("Wrong class", "The box fits an object, but of another class."),
    "location": ("Badly placed", "The class is right, but the box overlaps its object only by an IoU of 0.1 to 0.5."),
    "both": ("Wrong class, badly placed", "The box overlaps an object of another class, but not enough."),
    "duplicate": ("Duplicate", "A better detection has already found this object."),
    "background": ("Nothing annotated", "The box overlaps no annotated object: a false alarm or a missing annotation."),
    "missed": ("Never found", "No detection, however low its score, found this object or came close to it."),
}


class ImageErrors(NamedTuple):
    """The D detections of one image that count, best first, and how they match its G boxes."""

    detections: Detections
    kinds: np.ndarray  # [D] "right" or one of the KINDS
    targets: np.ndarray  # [D] index of the box that each one found or should have found; -1 for none
    taken: np.ndarray  # for those above CONFUSION_SCORE: index of the box, of any class, that each took; -1 for none
    near: np.ndarray  # [G] highest IoU of each box with a detection of any class


@dataclass
class ErrorAnalysis:
    """The errors of a detector."""

    ap50: float  # COCO's
    counts: dict[str, int]  # errors of each of the KINDS
    lost: dict[str, float]  # AP that fixing all errors of a kind, and nothing else, would add
    # [K + 1, K + 1] counts of detections above CONFUSION_SCORE: rows are the true class, columns the detected one; the
    # last row and column are the background.
    confusion: np.ndarray
    images: dict[int, ImageErrors]  # by sample index


class _Judged(NamedTuple):
    """The N detections of a data set, judged as in ImageErrors."""

    scores: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    boxes: np.ndarray  # their targets, as indices of all boxes of the data set; -1 for none

    def targeted(self) -> np.ndarray:
        """The boxes that are some detection's target: they were found, or nearly found."""
        return np.unique(self.boxes[self.boxes >= 0])


def greedy_match(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Assign boxes to detections: each detection, best first, takes the free box that it overlaps most.

    From the IoU [D, G] follows the index of the box that each detection takes, [D]; -1 if none reaches the threshold.
    """
    free, taken = iou.copy(), np.full(len(iou), -1)
    for detection in range(len(iou) if iou.size else 0):
        box = free[detection].argmax()
        if free[detection, box] >= threshold:
            taken[detection] = box
            free[:, box] = -1
    return taken


def judge(
    dataset: DetectionDataset, found: Mapping[int, Detections], score_threshold: float = 0.0
) -> dict[int, tuple[Detections, np.ndarray, np.ndarray]]:
    """Find out which detections are right and which boxes were found, for drawing.

    Takes the detections of `detection.detect`. Returns for each index those above the threshold, whether each is right
    [N] bool, and whether each box of the image was found [G] bool.
    """
    judged = {}
    for index, one in found.items():
        detections = Detections(*(values[one.scores > score_threshold] for values in one))
        annotations = dataset.load_annotations(index)
        iou = compute_overlap(detections.boxes, annotations[:, :4])  # [N, G]
        iou[detections.labels.numpy()[:, None] != annotations[:, 4]] = 0
        taken = greedy_match(iou, RIGHT_IOU)
        judged[index] = detections, taken >= 0, np.isin(np.arange(len(annotations)), taken)
    return judged


def _in_regions(detections: Detections, regions: np.ndarray) -> np.ndarray:
    """[D] whether each detection lies at least half in a region [R, 5] of its class (a crowd, a difficult box)."""
    boxes, areas = detections.boxes.double(), torch.from_numpy(regions).double()
    covered = box_intersection(boxes, areas[:, :4]) / box_area(boxes).clamp(min=1e-9)[:, None]  # [D, R]
    return ((covered >= RIGHT_IOU) & (detections.labels[:, None] == areas[:, 4])).any(dim=1).numpy()


def _judge_image(found: Detections, annotations: np.ndarray, regions: np.ndarray) -> ImageErrors:
    """Match the detections of one image, best first, with its boxes; wrong ones in a region do not count."""
    labels, box_labels = found.labels.numpy(), annotations[:, 4]
    iou = compute_overlap(found.boxes, annotations[:, :4])  # [D, G]
    kinds, targets = np.full(len(labels), "background", dtype="U10"), np.full(len(labels), -1)
    if iou.size:
        same = labels[:, None] == box_labels
        own, other = iou * same, iou * ~same  # [D, G]
        right = greedy_match(own, RIGHT_IOU)
        kinds[iou.max(axis=1) > OVERLAP_IOU] = "both"
        kinds[(own * np.isin(np.arange(len(box_labels)), right)).max(axis=1) >= RIGHT_IOU] = "duplicate"
        for kind, overlaps, low, high in (("class", other, RIGHT_IOU, 1.01), ("location", own, OVERLAP_IOU, RIGHT_IOU)):
            best = overlaps.max(axis=1)
            of_kind = (best >= low) & (best < high)
            kinds[of_kind] = kind
            targets[of_kind] = overlaps.argmax(axis=1)[of_kind]
        kinds[right >= 0] = "right"
        targets[right >= 0] = right[right >= 0]
    # As in COCO, a right detection inside a crowd counts.
    counted = (kinds == "right") | ~_in_regions(found, regions)
    found, iou = Detections(*(values[torch.from_numpy(counted)] for values in found)), iou[counted]
    taken = greedy_match(iou[found.scores.numpy() > CONFUSION_SCORE], RIGHT_IOU)
    return ImageErrors(found, kinds[counted], targets[counted], taken, iou.max(axis=0, initial=0))


def _mean_ap(scores: np.ndarray, labels: np.ndarray, right: np.ndarray, num_boxes: np.ndarray) -> float:
    """AP as COCO computes it at one IoU: the mean over the classes that have boxes; 0 if none has."""
    precisions = []
    for label in np.flatnonzero(num_boxes):
        of_class = labels == label
        found = np.cumsum(right[of_class][np.argsort(-scores[of_class], kind="stable")])
        recall, precision = found / num_boxes[label], found / np.arange(1, len(found) + 1)
        precisions.append(average_precision(recall, precision, COCO_RECALLS))
    return float(np.mean(precisions)) if precisions else 0.0


def _fixed_ap(judged: _Judged, kind: str, box_labels: np.ndarray) -> float:
    """AP after all errors of one kind are fixed.

    A class or location error becomes right if no detection found its box and no other error of these two kinds has a
    higher score for it; otherwise it is removed. Errors of the other kinds are removed, and missed boxes do not count.
    """
    right, wrong = judged.kinds == "right", judged.kinds == kind
    num_boxes, labels, kept = np.bincount(box_labels), judged.labels.copy(), ~wrong
    if kind == "missed":
        num_boxes = np.bincount(box_labels[judged.targeted()])
    elif kind in ("class", "location"):
        candidates = np.flatnonzero(~right & (judged.boxes >= 0))
        candidates = candidates[~np.isin(judged.boxes[candidates], judged.boxes[right])]
        candidates = candidates[np.argsort(-judged.scores[candidates], kind="stable")]
        _, first = np.unique(judged.boxes[candidates], return_index=True)
        fixed = candidates[first][wrong[candidates[first]]]
        kept[fixed] = right[fixed] = True
        labels[fixed] = box_labels[judged.boxes[fixed]]
    return _mean_ap(judged.scores[kept], labels[kept], right[kept], num_boxes)


def analyse(
    dataset: DetectionDataset, detections: Mapping[int, Detections], limit: int = MAX_DETECTIONS
) -> ErrorAnalysis:
    """Count the errors of a detector by kind, with the AP that each kind costs.

    Detections are best first, boxes in pixels of the original image; wrong ones in a crowd or on a difficult box do not
    count. As in COCO, the first `limit` detections of each class in an image count.
    """
    background = dataset.num_classes()
    confusion = np.zeros((background + 1, background + 1), dtype=np.int64)
    parts, box_labels, num_boxes, images = [], [], 0, {}
    for index in sorted(detections):
        annotations, labels = dataset.load_annotations(index), detections[index].labels
        image_labels = annotations[:, 4].astype(np.int64)
        rank = (labels[:, None] == labels).tril(-1).sum(dim=1)  # within its class
        found = Detections(*(values[rank < limit] for values in detections[index]))
        one = images[index] = _judge_image(found, annotations, dataset.load_difficult(index))
        scores, labels, _ = (values.numpy() for values in one.detections)
        parts.append((scores, labels, one.kinds, np.where(one.targets < 0, -1, one.targets + num_boxes)))
        box_labels.append(image_labels)
        num_boxes += len(annotations)
        padded = np.append(image_labels, background)  # so that index -1 is the background
        np.add.at(confusion, (padded[one.taken], labels[scores > CONFUSION_SCORE]), 1)
        np.add.at(confusion, (np.delete(image_labels, one.taken[one.taken >= 0]), background), 1)

    judged = _Judged(*map(np.concatenate, zip(*parts, strict=True)))
    labels = np.concatenate(box_labels)
    ap50 = _mean_ap(judged.scores, judged.labels, judged.kinds == "right", np.bincount(labels))
    counts = {kind: int((judged.kinds == kind).sum()) for kind in KINDS}
    counts["missed"] = num_boxes - len(judged.targeted())
    lost = {kind: max(0.0, _fixed_ap(judged, kind, labels) - ap50) for kind in KINDS}
    return ErrorAnalysis(ap50, counts, lost, confusion, images)


def error_table(analysis: ErrorAnalysis) -> str:
    """The kinds of errors, their number and cost, as text."""
    lines = [f"AP50 {analysis.ap50:.3f}; fixing all errors of one kind would add:"]
    for kind, (_, meaning) in KINDS.items():
        lines.append(f"  {kind:10} {analysis.lost[kind]:.3f}  {analysis.counts[kind]:6d} x  {meaning}")
    return "\n".join(lines)


def confusion_table(analysis: ErrorAnalysis, class_names: Sequence[str], limit: int = 10) -> str:
    """The most frequent confusions as text, at most `limit` lines."""
    counts = analysis.confusion.copy()
    np.fill_diagonal(counts, 0)
    names, background = [shortened(name) for name in class_names], len(class_names)
    lines = []
    for place in np.argsort(-counts, axis=None, kind="stable")[:limit]:
        true, detected = np.unravel_index(place, counts.shape)
        if not counts[true, detected]:
            break
        if detected == background:
            what = f"{names[true]} missed"
        elif true == background:
            what = f"{names[detected]} found in the background"
        else:
            what = f"{names[true]} found as {names[detected]}"
        lines.append(f"  {counts[true, detected]:6d} x  {what}")
    return "\n".join([f"most frequent confusions, of scores above {CONFUSION_SCORE}:", *lines])
