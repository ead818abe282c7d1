"""Where the AP goes: each kind of error, with the AP that mending it would give; and who is taken for whom.

The kinds, and what mending means, are those of TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying
Object Detection Errors", 2020), at its thresholds: IoU 0.5 to be right, 0.1 to have seen anything of a box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from retinanet.boxes import box_iou
from retinanet.data.dataset import DetectionDataset
from retinanet.postprocess import Detections

FOUND_IOU, SEEN_IOU = 0.5, 0.1
CONFUSION_SCORE = 0.5  # detections above it enter the confusion matrix
RECALLS = np.linspace(0, 1, 101)  # where COCO reads a precision-recall curve

KINDS = {
    "class": "overlaps a box of another class",
    "location": "overlaps a box of its class, but not enough",
    "both": "overlaps a box of another class, and not enough",
    "duplicate": "overlaps a box that a better detection found",
    "background": "overlaps nothing",
    "missed": "a box that no detection of the first two kinds could have found",
}


@dataclass
class ErrorAnalysis:
    """What went wrong.

    Attributes:
        ap50: COCO's AP50.
        counts: number of errors of each of the KINDS.
        lost: AP that mending all errors of a kind, and nothing else, would add.
        confusion: [K + 1, K + 1] counts: rows the true class, columns the class found, at the score
            `confusion_score`; the last row and column are the background.
    """

    ap50: float
    counts: dict[str, int]
    lost: dict[str, float]
    confusion: np.ndarray


class _Judged(NamedTuple):
    """All detections of a data set, or those of one image.

    Attributes:
        scores: [N].
        labels: [N].
        kinds: [N] "right" or one of the KINDS.
        boxes: [N] the ground-truth box that each one found or should have found; -1 for none.
    """

    scores: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    boxes: np.ndarray


def greedy_match(iou: np.ndarray, threshold: float) -> np.ndarray:
    """Deal boxes out to detections: each, from the best score down, takes the free box that it overlaps most.

    Args:
        iou: [D, G], detections best first.
        threshold: IoU from which a box is taken, above 0.

    Returns:
        [D] the box that each detection takes; -1 for none.
    """
    free, taken = iou.copy(), np.full(len(iou), -1)
    for detection in range(len(iou) if iou.size else 0):
        box = free[detection].argmax()
        if free[detection, box] >= threshold:
            taken[detection] = box
            free[:, box] = -1
    return taken


def judge(
    dataset: DetectionDataset,
    found: Mapping[int, Detections],
    score_threshold: float = 0.0,
    iou_threshold: float = FOUND_IOU,
) -> dict[int, tuple[Detections, np.ndarray, np.ndarray]]:
    """Which detections of each image are right, and which of its boxes were found; for drawings.

    Args:
        dataset: gives the boxes.
        found: of each sample index, best first, boxes in pixels of the original image.
        score_threshold: scores must be above it.
        iou_threshold: IoU with a box of its class from which a detection is right.

    Returns:
        For each index the detections above the threshold, [N] bool whether each is right, and [G] bool
        whether each box of the image was found.
    """
    judged = {}
    for index, one in found.items():
        detections = Detections(*(values[one.scores > score_threshold] for values in one))
        annotations = torch.from_numpy(dataset.load_annotations(index))
        iou = box_iou(detections.boxes, annotations[:, :4])  # [N, G]
        iou[detections.labels[:, None] != annotations[:, 4]] = 0
        taken = greedy_match(iou.numpy(), iou_threshold)
        judged[index] = detections, taken >= 0, np.isin(np.arange(len(annotations)), taken)
    return judged


def _ignored(boxes: np.ndarray, labels: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """[D] whether each detection lies at least half in a region [R, 5] of its class (a crowd, a difficult box)."""
    low = np.maximum(boxes[:, None, :2], regions[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], regions[None, :, 2:4])
    intersection = (high - low).clip(min=0).prod(axis=2)  # [D, R]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).clip(min=1e-9)
    return ((intersection / area[:, None] >= FOUND_IOU) & (labels[:, None] == regions[None, :, 4])).any(axis=1)


def _judge_image(scores: np.ndarray, labels: np.ndarray, iou: np.ndarray, box_labels: np.ndarray) -> _Judged:
    """Find the kind of each detection of one image.

    Args:
        scores: [D], best first.
        labels: [D].
        iou: [D, G] with the image's boxes.
        box_labels: [G].
    """
    kinds, boxes = np.full(len(scores), "background", dtype="U10"), np.full(len(scores), -1)
    if iou.size == 0:
        return _Judged(scores, labels, kinds, boxes)
    same = labels[:, None] == box_labels[None]
    own, other = iou * same, iou * ~same  # [D, G]
    found = greedy_match(np.where(same, iou, -1), FOUND_IOU)
    taken = np.isin(np.arange(len(box_labels)), found)
    kinds[iou.max(axis=1) > SEEN_IOU] = "both"
    kinds[(own * taken).max(axis=1) >= FOUND_IOU] = "duplicate"
    for kind, overlaps, low, high in (("class", other, FOUND_IOU, 1.01), ("location", own, SEEN_IOU, FOUND_IOU)):
        best = overlaps.max(axis=1)
        of_kind = (best >= low) & (best < high)
        kinds[of_kind] = kind
        boxes[of_kind] = overlaps.argmax(axis=1)[of_kind]
    kinds[found >= 0] = "right"
    boxes[found >= 0] = found[found >= 0]
    return _Judged(scores, labels, kinds, boxes)


def _mean_ap(scores: np.ndarray, labels: np.ndarray, right: np.ndarray, num_boxes: np.ndarray) -> float:
    """AP as COCO computes it at one IoU: the mean over the classes that have boxes; 0 if none has."""
    precisions = []
    for label in np.flatnonzero(num_boxes):
        of_class = labels == label
        order = np.argsort(-scores[of_class], kind="stable")
        found = np.cumsum(right[of_class][order])
        precision = found / np.arange(1, len(found) + 1)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        precisions.append(envelope[np.searchsorted(found / num_boxes[label], RECALLS)].mean())
    return float(np.mean(precisions)) if precisions else 0.0


def _mended_ap(judged: _Judged, kind: str, box_labels: np.ndarray, base: float) -> float:
    """What the AP gains when all errors of one kind are mended.

    Errors of class and of location become right, if they are the best of both kinds for a box that nothing
    found, and vanish otherwise; errors of the other kinds vanish; missed boxes are no longer asked for.
    """
    right = judged.kinds == "right"
    taken = np.isin(np.arange(len(box_labels)), judged.boxes[right])
    wrong = judged.kinds == kind
    num_boxes = np.bincount(box_labels)
    labels = judged.labels.copy()
    kept = ~wrong
    if kind == "missed":
        num_boxes = num_boxes - np.bincount(box_labels[_missed(judged, len(box_labels))], minlength=len(num_boxes))
    elif kind in ("class", "location"):
        candidates = np.flatnonzero(~right & (judged.boxes >= 0))
        candidates = candidates[~taken[judged.boxes[candidates]]]
        candidates = candidates[np.argsort(-judged.scores[candidates], kind="stable")]
        _, first = np.unique(judged.boxes[candidates], return_index=True)
        mended = candidates[first][wrong[candidates[first]]]
        kept[mended] = right[mended] = True
        labels[mended] = box_labels[judged.boxes[mended]]
    return max(0.0, _mean_ap(judged.scores[kept], labels[kept], right[kept], num_boxes) - base)


def _missed(judged: _Judged, num_boxes: int) -> np.ndarray:
    """[G] whether a box was neither found nor nearly found."""
    return ~np.isin(np.arange(num_boxes), judged.boxes)


def analyse(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections],
    confusion_score: float = CONFUSION_SCORE,
    max_detections: int = 100,
) -> ErrorAnalysis:
    """Take the errors of a detector apart.

    Args:
        dataset: gives the boxes; detections that find none of them do not count in crowds and on difficult boxes.
        detections: of each sample index, best first, boxes in pixels of the original image.
        confusion_score: detections above it enter the confusion matrix.
        max_detections: of each class in an image that count, as in COCO.
    """
    num_classes = dataset.num_classes()
    confusion = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    parts, box_labels, num_boxes = [], [], 0
    for index in sorted(detections):
        truth = dataset.load_annotations(index)
        truth_labels = truth[:, 4].astype(np.int64)
        rank = (detections[index].labels[:, None] == detections[index].labels).tril(-1).sum(dim=1)  # within its class
        scores, labels, boxes = (values[rank < max_detections].numpy() for values in detections[index])
        iou = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(truth[:, :4]).double()).numpy()
        part = _judge_image(scores, labels, iou, truth_labels)
        # As in COCO, a box that is found in a crowd counts.
        counted = (part.kinds == "right") | ~_ignored(boxes, labels, dataset.load_difficult(index))
        part = _Judged(*(column[counted] for column in part))
        scores, labels, iou = scores[counted], labels[counted], iou[counted]
        part.boxes[part.boxes >= 0] += num_boxes
        parts.append(part)
        box_labels.append(truth_labels)
        num_boxes += len(truth)
        sure = scores > confusion_score
        found = greedy_match(iou[sure], FOUND_IOU)
        padded = np.append(truth_labels, num_classes)  # -1 reads the background
        np.add.at(confusion, (padded[found], labels[sure]), 1)
        np.add.at(confusion, (np.delete(truth_labels, found[found >= 0]), num_classes), 1)

    judged = _Judged(*map(np.concatenate, zip(*parts, strict=True)))
    all_labels = np.concatenate(box_labels)
    boxes_of_class = np.bincount(all_labels, minlength=num_classes)
    base = _mean_ap(judged.scores, judged.labels, judged.kinds == "right", boxes_of_class)
    counts = {kind: int((judged.kinds == kind).sum()) for kind in KINDS}
    counts["missed"] = int(_missed(judged, num_boxes).sum())
    lost = {kind: _mended_ap(judged, kind, all_labels, base) for kind in KINDS}
    return ErrorAnalysis(base, counts, lost, confusion)


def error_table(analysis: ErrorAnalysis) -> str:
    """The kinds of errors, their number and cost, as text."""
    lines = [f"AP50 {analysis.ap50:.3f}; mending all errors of one kind would add:"]
    for kind, meaning in KINDS.items():
        lines.append(f"  {kind:10} {analysis.lost[kind]:.3f}  {analysis.counts[kind]:6d} x  {meaning}")
    return "\n".join(lines)


def confusion_table(analysis: ErrorAnalysis, names: Sequence[str], most: int = 10) -> str:
    """The commonest confusions as text, at most `most` lines."""
    names = [*names, "background"]
    off_diagonal = analysis.confusion.copy()
    np.fill_diagonal(off_diagonal, 0)
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:most]
    pairs = [(*np.unravel_index(place, off_diagonal.shape), off_diagonal.flat[place]) for place in order]
    background = len(names) - 1
    lines = []
    for row, column, count in pairs:
        what = f"{names[row]} found as {names[column]}"
        if background in (row, column):
            what = f"{names[row]} missed" if column == background else f"{names[column]} found in the background"
        lines += [f"  {count:6d} x  {what}"] if count else []
    return "\n".join([f"commonest confusions, of scores above {CONFUSION_SCORE}:", *lines])
