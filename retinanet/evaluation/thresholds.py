"""Above which score detections are worth keeping: precision, recall and F1 over the score, and the counts there."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Ranking(NamedTuple):
    """The N detections that count, of one class or of all, best first, and the boxes of I images."""

    scores: np.ndarray  # [N]
    right: np.ndarray  # [N] bool: found a box that no better one has found
    images: np.ndarray  # [N] place of its image among the I
    boxes: np.ndarray  # [I] number of ground-truth boxes


class Point(NamedTuple):
    """What the detections with scores above a threshold are worth."""

    score: float  # the threshold
    f1: float  # harmonic mean of precision and recall
    precision: float  # share of the detections that are right
    recall: float  # share of the boxes that were found
    right: int
    false: int
    missed: int
    count_error: float  # number of detections - number of boxes, mean over the images
    absolute_count_error: float  # the same of its absolute value


def pooled(rankings: Iterable[Ranking]) -> Ranking:
    """One ranking of all classes."""
    scores, right, images, boxes = zip(*rankings, strict=True)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return Ranking(*(np.concatenate(column)[order] for column in (scores, right, images)), sum(boxes))


def _rates(ranking: Ranking, counts: np.ndarray) -> np.ndarray:
    """[3, T] precision, recall and F1 of the best `counts` [T] detections; precision is NaN without any."""
    right, boxes = np.append(0, np.cumsum(ranking.right))[counts], ranking.boxes.sum()
    return np.stack(
        [right / np.where(counts, counts, np.nan), right / max(1, boxes), 2 * right / np.maximum(counts + boxes, 1)]
    )


def rates_above(ranking: Ranking, scores: np.ndarray) -> np.ndarray:
    """[3, T] precision, recall and F1 of the detections above each of the `scores` [T]."""
    return _rates(ranking, counts_above(ranking, scores)[0])


def counts_above(ranking: Ranking, scores: np.ndarray) -> np.ndarray:
    """[2, T] int: how many detections are above each of the `scores` [T], and how many of these are right."""
    counts = np.searchsorted(-ranking.scores, -scores)
    return np.stack([counts, np.append(0, np.cumsum(ranking.right))[counts]])


def _steps(ranking: Ranking) -> np.ndarray:
    """[T] how many detections can be kept by a threshold: those of equal scores go together."""
    return np.unique(np.searchsorted(-ranking.scores, -ranking.scores, side="right"))


@np.errstate(over="ignore")  # results files may hold any number
def threshold(ranking: Ranking, count: int) -> float:
    """The score above which the best `count` detections are: of few digits, so that it can be typed and stays exact."""
    last = float(ranking.scores[count - 1])
    if count < len(ranking.scores):
        below = float(ranking.scores[count])
    else:  # there may be more below, which were not detected
        below = min(float(np.nextafter(np.float32(last), np.float32(-np.inf))), last - abs(last) / 1000)
    for digits in range(1, 9):
        score = round(below / 2 + last / 2, digits)
        if below <= score < last and below <= np.float32(score) < last:  # a detector's scores are float32
            return score
    return below


def _point(ranking: Ranking, count: int) -> Point:
    """The Point that keeps the best `count` detections."""
    right, boxes = int(ranking.right[:count].sum()), int(ranking.boxes.sum())
    errors = np.bincount(ranking.images[:count], minlength=len(ranking.boxes)) - ranking.boxes
    precision, recall, f1 = _rates(ranking, np.array([count]))[:, 0].tolist()
    counts = right, count - right, boxes - right
    mean_errors = float(errors.mean()), float(np.abs(errors).mean())
    return Point(threshold(ranking, count), f1, precision, recall, *counts, *mean_errors)


def best_f1(ranking: Ranking) -> Point | None:
    """The Point of the best F1, the highest score of equal ones; None if no detection is right."""
    steps = _steps(ranking)
    return _point(ranking, int(steps[_rates(ranking, steps)[2].argmax()])) if ranking.right.any() else None


def at_precision(ranking: Ranking, precision: float) -> Point | None:
    """The Point of the lowest score whose precision is `precision` or better; None if no score's is."""
    steps = _steps(ranking)
    steps = steps[_rates(ranking, steps)[0] >= precision]
    return _point(ranking, int(steps[-1])) if len(steps) else None
