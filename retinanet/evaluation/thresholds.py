"""Score thresholds above which detections are worth keeping, with the precision, recall, F1 and counts of each."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Ranking(NamedTuple):
    """The N detections of one class or of all that count, best first, and the numbers of boxes in I images."""

    scores: np.ndarray  # [N]
    right: np.ndarray  # [N] bool: found a box that no better detection found
    images: np.ndarray  # [N] index of the image, below I
    boxes: np.ndarray  # [I] number of ground-truth boxes


class Point(NamedTuple):
    """A score threshold, and the quality of the detections above it."""

    score: float  # the threshold
    precision: float  # share of the detections that are right
    recall: float  # share of the boxes that were found
    f1: float  # harmonic mean of precision and recall
    right: int
    false: int
    missed: int
    count_error: float  # number of detections - number of boxes, mean over the images
    absolute_count_error: float  # mean of the absolute value of this difference


def pooled(rankings: Iterable[Ranking]) -> Ranking:
    """One ranking of all classes."""
    scores, right, images, boxes = zip(*rankings, strict=True)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Ranking(*(np.concatenate(column)[order] for column in (scores, right, images)), sum(boxes))


def _rates(ranking: Ranking, counts: np.ndarray) -> np.ndarray:
    """[3, T] precision, recall and F1 of the best `counts` [T] detections; precision is NaN without any."""
    right, boxes = np.append(0, np.cumsum(ranking.right))[counts], ranking.boxes.sum()
    precision = right / np.where(counts, counts, np.nan)
    return np.stack([precision, right / max(1, boxes), 2 * right / np.maximum(counts + boxes, 1)])


def rates_above(ranking: Ranking, scores: np.ndarray) -> np.ndarray:
    """[3, T] precision, recall and F1 of the detections above each of the `scores` [T]."""
    return _rates(ranking, counts_above(ranking, scores)[0])


def counts_above(ranking: Ranking, scores: np.ndarray) -> np.ndarray:
    """[2, T] int: how many detections are above each of the `scores` [T], and how many of these are right."""
    counts = np.searchsorted(-ranking.scores, -scores)
    return np.stack([counts, np.append(0, np.cumsum(ranking.right))[counts]])


def _steps(ranking: Ranking) -> np.ndarray:
    """[T] numbers of detections that a threshold can keep; it cannot separate equal scores."""
    return np.unique(np.searchsorted(-ranking.scores, -ranking.scores, side="right"))


@np.errstate(over="ignore")  # results files may hold any number
def threshold(ranking: Ranking, count: int) -> float:
    """A threshold that keeps exactly the best `count` detections, with few digits, so that it can be typed."""
    last = float(ranking.scores[count - 1])
    if count < len(ranking.scores):
        below = float(ranking.scores[count])
    else:  # the detector may have omitted detections with lower scores
        below = min(float(np.nextafter(np.float32(last), np.float32(-np.inf))), last - abs(last) / 1000)
    for digits in range(1, 9):
        score = round(below / 2 + last / 2, digits)
        if below <= score < last and below <= np.float32(score) < last:  # a detector's scores are float32
            return score
    return below


def _point(ranking: Ranking, count: int) -> Point:
    """The Point whose threshold keeps the best `count` detections."""
    right, boxes = int(ranking.right[:count].sum()), int(ranking.boxes.sum())
    counts = right, count - right, boxes - right
    rates = _rates(ranking, np.array([count]))[:, 0].tolist()
    errors = np.bincount(ranking.images[:count], minlength=len(ranking.boxes)) - ranking.boxes
    return Point(threshold(ranking, count), *rates, *counts, float(errors.mean()), float(np.abs(errors).mean()))


def best_f1(ranking: Ranking) -> Point | None:
    """The Point of the best F1, with the highest threshold among equals; None if no detection is right."""
    steps = _steps(ranking)
    return _point(ranking, int(steps[_rates(ranking, steps)[2].argmax()])) if ranking.right.any() else None


def at_precision(ranking: Ranking, precision: float) -> Point | None:
    """The Point of the lowest threshold with a precision of at least `precision`; None if there is none."""
    steps = _steps(ranking)
    steps = steps[_rates(ranking, steps)[0] >= precision]
    return _point(ranking, int(steps[-1])) if len(steps) else None
