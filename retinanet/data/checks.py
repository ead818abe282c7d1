"""What is wrong with a data set beyond its annotation files: `python -m retinanet check`.

The readers of the formats report what is wrong within the annotation files. Here the annotations are compared with
their images, and the training set with the validation set; `train.py` does the cheap part before its first step.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import ImageHeader, read_header, read_image, valid_orientation
from retinanet.data.report import CLIPPED, DROPPED, MIN_SIDE, WARNED, Report
from retinanet.errors import UserError, shown
from retinanet.process import log, progress

# How closely images are checked: whether the files exist; also some headers, or all those of images whose sizes the
# annotations do not declare; all headers; every pixel.
DEPTHS = ("none", "quick", "headers", "decode")
QUICK_HEADERS = 500
MARGIN = 1  # pixels by which a box may exceed its image without being reported; annotation tools round


def check_before_training(train_set: DetectionDataset, val_set: DetectionDataset | None, strict: bool) -> None:
    """Check the data of a training run, cheaply; warnings are logged.

    Raises:
        DataError: the message lists all that is fatal; with `strict`, all that is wrong.
    """
    report = check_dataset(train_set)
    if val_set is not None:
        report.merge(check_dataset(val_set, training=False))
        check_overlap(train_set, val_set, False, report)
    report.raise_errors(strict)
    if kinds := report.kinds(DROPPED, CLIPPED, WARNED):
        log.warning("%s", report.text(kinds, max_examples=3))


def check_dataset(dataset: DetectionDataset, depth: str = "quick", training: bool = True, workers: int = 1) -> Report:
    """Check a data set whose annotation files could be read.

    Where all headers are read, the data set's `image_sizes` are known afterwards.

    Args:
        dataset: any.
        depth: one of DEPTHS.
        training: the data set is for training, and so needs boxes of each class.
        workers: threads that decode images.

    Returns:
        What was found here and when the annotation files were read.
    """
    report = Report()
    report.merge(dataset.report)
    if dataset.in_files:
        sizes = _check_images(dataset, depth, workers, report)
        _check_repeated(dataset, report)
    else:
        sizes = dataset.image_sizes
    _check_borders(dataset, sizes, report)
    if training:
        counts = np.bincount(dataset.annotations[:, 4].astype(np.int64), minlength=dataset.num_classes())
        if not counts.any():
            report.add("no boxes", dataset.source, "has no boxes to learn from")
        else:
            unused = [shown(dataset.label_to_name(label)) for label in np.flatnonzero(counts == 0)]
            report.add_rows("unused class", unused, lambda _: dataset.source, lambda name: f"no box has class {name}")
    return report


def check_overlap(train_set: DetectionDataset, val_set: DetectionDataset, same_content: bool, report: Report) -> None:
    """Report images of the validation set that are in the training set, too.

    Args:
        train_set: whose images are in files.
        val_set: likewise.
        same_content: compare the contents of the files, not only their paths.
        report: gets them.
    """
    seen = {key: index for index, key in _keys(train_set, same_content)}
    both = [(seen[key], index) for index, key in _keys(val_set, same_content) if key in seen]
    report.add_rows(
        "leak",
        both,
        lambda pair: val_set.image_name(pair[1]),
        lambda pair: f"{shown(str(val_set.image_files[pair[1]]))} is trained on, too: {train_set.image_name(pair[0])}",
    )


def _check_repeated(dataset: DetectionDataset, report: Report) -> None:
    """Report images that are listed under two names: the boxes of one are background of the other."""
    first: dict[str | bytes, int] = {}
    pairs = [(first[key], index) for index, key in _keys(dataset, False) if first.setdefault(key, index) != index]
    report.add_rows(
        "repeated image",
        pairs,
        lambda pair: dataset.image_name(pair[1]),
        lambda pair: f"{shown(str(dataset.image_files[pair[1]]))} repeats {dataset.image_name(pair[0])}",
    )


def _keys(dataset: DetectionDataset, same_content: bool) -> Iterator[tuple[int, str | bytes]]:
    """Index of each image whose file exists, and what distinguishes it: its path, or a hash of its content."""
    for index in range(len(dataset)):
        path = dataset.find_image(index)
        if path is None:
            continue  # reported as missing
        if same_content:
            with contextlib.suppress(OSError):  # reported as unreadable
                yield index, hashlib.blake2b(Path(path).read_bytes()).digest()
        else:
            yield index, os.path.abspath(path)  # noqa: PTH100, several times as fast as pathlib


class _Look(NamedTuple):
    """What was found out about one image."""

    exists: bool
    header: ImageHeader | None = None
    fault: str = ""


def _look_at(dataset: DetectionDataset, index: int, depth: str) -> _Look:
    path = dataset.find_image(index)
    if path is None or depth == "none":
        return _Look(path is not None)
    try:
        header = read_header(path)
        if depth == "decode":
            height, width = read_image(path).shape[:2]
            header = ImageHeader(height, width, header.orientation)
    except UserError as error:
        return _Look(True, fault=str(error))
    return _Look(True, header)


def _check_images(dataset: DetectionDataset, depth: str, workers: int, report: Report) -> np.ndarray:
    """Check the image files; returns [I, 2] height and width, 0 where they are not known."""
    number, declared = len(dataset), dataset.declared_sizes
    depths = np.full(number, "headers" if depth == "quick" else depth, dtype=object)
    if depth == "quick" and declared is not None:
        depths[:] = "none"
        depths[np.linspace(0, number - 1, min(number, QUICK_HEADERS)).astype(int)] = "headers"
    sizes = np.zeros((number, 2), dtype=np.int64) if declared is None else declared.copy()
    # Only decoding gains from threads: the rest is Python.
    with ThreadPoolExecutor(workers if depth == "decode" and workers > 1 else 1) as pool:
        looks = pool.map(lambda index: _look_at(dataset, index, depths[index]), range(number))
        looks = list(progress(looks, "checking images", number))
    for index, look in enumerate(looks):
        where = dataset.image_name(index)
        if look.fault:
            report.add("unreadable image", where, look.fault)
        if look.header is None:
            continue
        sizes[index], orientation = look.header[:2], look.header.orientation
        if orientation != 1 and valid_orientation(orientation) == 1:
            report.add("EXIF rotation", where, f"{shown(orientation)}; the image is not turned")
        elif orientation != 1:
            message = f"is turned upright by its EXIF orientation {orientation}; its boxes must fit the upright image"
            report.add("EXIF rotation", where, message)
        if declared is not None and tuple(declared[index]) != look.header[:2]:
            report.add("declared size", where, _explain_size(*declared[index].tolist(), look.header))
    missing = [index for index, look in enumerate(looks) if not look.exists]
    report.add_rows("missing image", missing, dataset.image_name, dataset.explain_missing)
    if declared is None and all(look.header for look in looks):
        dataset.image_sizes = sizes
    return sizes


def _explain_size(height: int, width: int, header: ImageHeader) -> str:
    message = (
        f"is declared as {width} x {height}, but the file has {header.width} x {header.height} pixels, which count"
    )
    if (width, height) == header[:2]:
        turned = valid_orientation(header.orientation) >= 5
        message += "; EXIF turns it: were its boxes drawn before?" if turned else "; are the two swapped?"
    return message


def _check_borders(dataset: DetectionDataset, sizes: np.ndarray, report: Report) -> None:
    """Report boxes outside their images, and what their numbers may mean instead."""
    known = np.flatnonzero(sizes[dataset.image_index].all(axis=1))
    boxes, limits = dataset.annotations[known, :4], sizes[dataset.image_index[known]][:, ::-1]  # limits: width, height
    if not len(boxes):
        return

    def overhang(boxes: np.ndarray) -> np.ndarray:
        return np.maximum(-boxes[:, :2], boxes[:, 2:] - limits).max(axis=1)

    def show(row: int) -> str:
        height, width = sizes[dataset.image_index[row]]
        return (
            ",".join(f"{number:g}" for number in dataset.annotations[row, :4]) + f" in an image of {width} x {height}"
        )

    clipped = np.concatenate([boxes[:, :2].clip(0, limits), boxes[:, 2:].clip(0, limits)], axis=1)
    outside = ((clipped[:, 2:] - clipped[:, :2]) < MIN_SIDE).any(axis=1)
    beyond = overhang(boxes) > MARGIN
    for kind, mask, message in (
        ("box outside", outside, "the box lies outside"),
        ("box partly outside", beyond & ~outside, "the box is partly outside"),
    ):
        report.add_rows(kind, known[mask], dataset.annotation_name, lambda row, text=message: f"{text}: {show(row)}")
    if beyond.sum() <= max(2, len(boxes) / 20):
        return
    count = f"{beyond.sum():,} of {len(boxes):,} boxes exceed the borders of their images"
    if (overhang(boxes[:, [1, 0, 3, 2]]) <= MARGIN).all():
        report.add("looks swapped", dataset.source, f"{count}, but none does with x and y swapped: is y written first?")
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    valid = (overhang(corners) <= MARGIN) & (corners[:, 2:] > corners[:, :2]).all(axis=1)
    if dataset.box_format == "xywh" and valid.all():
        message = f"{count}, but none does if bbox is x1, y1, x2, y2; it must be x, y, width, height"
        report.add("looks like x1, y1, x2, y2", dataset.source, message)


def summary(dataset: DetectionDataset) -> str:
    """The numbers of images and boxes, in all and of each class."""
    per_image, labels = np.diff(dataset.offsets), dataset.annotations[:, 4].astype(np.int64)
    boxes = np.bincount(labels, minlength=dataset.num_classes())
    images = np.bincount(np.unique(dataset.image_index * len(boxes) + labels) % len(boxes), minlength=len(boxes))
    lines = [
        f"{dataset.source}: {len(dataset):,} images, {int((per_image == 0).sum()):,} of them without boxes; "
        f"{len(labels):,} boxes, at most {per_image.max()} in an image; {len(boxes):,} classes"
    ]
    most = {label: shown(dataset.label_to_name(label)) for label in np.argsort(-boxes, kind="stable")[:20]}
    width = max(map(len, most.values()))
    lines += [f"  {name:{width}} {boxes[label]:9,} boxes in {images[label]:7,} images" for label, name in most.items()]
    if len(boxes) > len(most):
        lines.append(f"  ... and {len(boxes) - len(most):,} more classes")
    return "\n".join(lines)
