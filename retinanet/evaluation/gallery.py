"""The images of report.html: which ones it shows, their files, and the boxes that its script draws on them."""

import collections
import heapq
import itertools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError, escaped
from retinanet.evaluation import errors

MAX_IMAGES, MAX_BOXES = 300, 60_000
MAX_BYTES = 40_000_000  # of all JPEG files
# Long side in pixels and JPEG quality, best first: an image gets the first pair whose file is small enough.
QUALITIES = ((1280, 82), (1280, 65), (960, 60), (640, 50), (320, 40))
NEAR_IOU = 0.1  # a box that no detection overlaps by more than this may be an annotation error


def choose_images(dataset: DetectionDataset, analysis: errors.ErrorAnalysis, score: float) -> list[int]:
    """The sample indices of the gallery: the worst images of each kind of error, and of each class in it, in turn.

    A false detection is worse the higher its score is; a box that has no right detection above `score` is worse the
    larger it is. There are at most MAX_IMAGES images, with at most MAX_BOXES boxes and detections.
    """
    groups = collections.defaultdict(list)  # (weight, index) of each error
    for index, one in analysis.images.items():
        annotations, hit = dataset.load_annotations(index), set()
        true_labels, areas = annotations[:, 4].tolist(), (annotations[:, 2:4] - annotations[:, :2]).prod(axis=1)
        found = one.kinds.tolist(), one.targets.tolist(), one.detections.scores.tolist(), one.detections.labels.tolist()
        for kind, target, weight, label in zip(*found, strict=True):
            if kind != "right":
                groups[kind].append((weight, index))
                groups[kind, label, kind == "class" and true_labels[target]].append((weight, index))
            elif weight > score:
                hit.add(target)
        for box, (label, area, near) in enumerate(zip(true_labels, areas.tolist(), one.near.tolist(), strict=True)):
            for kind, applies in (("missing", box not in hit), ("odd", near <= NEAR_IOU)):
                if applies:
                    groups[kind].append((area, index))
                    groups[kind, label].append((area, index))
    queues = [heapq.nlargest(MAX_IMAGES, group) for group in sorted(groups.values(), key=len, reverse=True)]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    chosen = list(dict.fromkeys(entry[1] for entry in rounds if entry))[:MAX_IMAGES]
    boxes = np.cumsum([len(analysis.images[i].kinds) + len(analysis.images[i].near) for i in chosen])
    return chosen[: max(1, int((boxes <= MAX_BOXES).sum()))]


Saved = tuple[str, tuple[int, int]] | tuple[None, None]  # name, and height and width before downscaling


def save_images(dataset: DetectionDataset, indices: Sequence[int], folder: Path) -> list[Saved]:
    """Write images as JPEG to a folder, in place of an earlier report's; (None, None) for those that are unreadable."""
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link; remove it, or choose another folder")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("image_[0-9][0-9][0-9].jpg"):
        old.unlink()
    paths = [folder / f"image_{number:03}.jpg" for number in range(len(indices))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(partial(_save_image, dataset, MAX_BYTES // max(1, len(indices))), indices, paths))


def _save_image(dataset: DetectionDataset, budget: int, index: int, path: Path) -> Saved:
    """Write one image, if possible in at most `budget` bytes."""
    try:
        pixels = dataset.load_image(index)
    except (UserError, OSError):
        return None, None
    image = Image.fromarray(pixels)
    for side, quality in QUALITIES:
        image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2)
        image.save(path, quality=quality)
        if path.stat().st_size <= budget:
            break
    return path.name, pixels.shape[:2]


def image_entry(
    dataset: DetectionDataset, index: int, one: errors.ImageErrors, saved: Saved, steps: np.ndarray
) -> dict[str, Any]:
    """The page's data about an image; boxes are rounded to tenths of its pixels.

    A detection's `target` is the box that it found or should have found, `took` the box that it took in the confusion
    matrix (-1: none, -2: its score is too low), `level` the number of steps below its score. A ground-truth box's `iou`
    is the highest with a detection, `place` where the box is in its file.
    """
    annotations, regions = dataset.load_annotations(index), dataset.load_difficult(index)
    scores, boxes = one.detections.scores.double().numpy(), one.detections.boxes.double().numpy()
    rows = range(dataset.offsets[index], dataset.offsets[index + 1])
    name, size = saved
    if size is None:  # the declared size or, if that is unknown too, room for all boxes
        known = dataset.known_sizes[index]
        corners = np.concatenate([annotations[:, 2:4], regions[:, 2:4], boxes[:, 2:].clip(0, 1e5)])
        size = known if known.all() else np.ceil(corners.max(axis=0, initial=1))[::-1]
    taken = np.full(len(boxes), -2)
    taken[: len(one.taken)] = one.taken
    found = {
        "corners": _finite(boxes, 1),
        "label": one.detections.labels,
        "score": _finite(scores, 4),
        "kind": one.kinds,
        "target": one.targets,
        "took": taken,
        "level": np.searchsorted(steps, scores),
    }
    truth = {
        "corners": _finite(annotations[:, :4], 1),
        "label": annotations[:, 4].astype(int),
        "iou": _finite(one.near, 3),
        "place": [escaped(dataset.annotation_name(row)) for row in rows],
    }
    return {
        "path": escaped(dataset.expected_path(index)),
        "file": name,
        "size": [int(side) for side in size],
        "found": _rows(found),
        "truth": _rows(truth),
        "ignored": _finite(regions[:, :4], 1),
    }


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Columns of equal length as one dictionary per row."""
    lists = [np.asarray(column).tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _finite(values: np.ndarray, digits: int) -> list:
    """Rounded numbers without infinity and NaN, which JSON cannot hold."""
    return np.nan_to_num(np.asarray(values, dtype=np.float64)).clip(-1e9, 1e9).round(digits).tolist()
