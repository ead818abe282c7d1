"""Look for what is wrong with a data set: `python -m retinanet.check --dataset ...`.

Reading the annotation files finds what is wrong within them (problems.py); here they meet their pictures, and the
training set meets the validation set. `train.py` does the cheap form of this before its first step.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import ImageHeader, read_header, read_image, valid_orientation
from retinanet.data.report import CLIPPED, DROPPED, MIN_SIDE, WARNED, Report
from retinanet.errors import UserError, shown
from retinanet.process import log, progress

# How closely pictures are looked at: whether they are there; also the headers of those that the annotations give no
# size of, and of some others; all headers; every pixel.
PICTURES = ("none", "quick", "headers", "decode")
QUICK_HEADERS = 500
MARGIN = 1  # pixels by which a box may pass its picture's border without a word; annotation tools round


def check_dataset(
    dataset: DetectionDataset, pictures: str = "quick", training: bool = True, workers: int = 1
) -> Report:
    """Look for what is wrong with a data set.

    Where all headers are read, the data set's `image_sizes` are known afterwards, and need not be read again.

    Args:
        dataset: any; that its annotation files could be read is taken for granted.
        pictures: one of PICTURES.
        training: it is to be trained on: it needs boxes, and of each class.
        workers: threads that decode pictures.

    Returns:
        What was found here and when the annotation files were read.
    """
    report = Report()
    report.merge(dataset.report)
    # Pictures that a data set draws or keeps in memory are not in files.
    sizes = _check_pictures(dataset, pictures, workers, report) if dataset.in_files else dataset.image_sizes
    _check_borders(dataset, np.asarray(sizes), report)
    if dataset.in_files:
        _check_repeated(dataset, report)
    if training:
        counts = np.bincount(dataset.annotations[:, 4].astype(np.int64), minlength=dataset.num_classes())
        if not counts.any():
            report.add("no boxes", dataset.source, "there is no box to learn from")
        else:
            report.add_rows(
                "unused class",
                np.flatnonzero(counts == 0),
                lambda _: dataset.source,
                lambda label: f"no box is of class {shown(dataset.label_to_name(label))}",
            )
    return report


def check_overlap(train_set: DetectionDataset, val_set: DetectionDataset, same_content: bool, report: Report) -> None:
    """Report pictures of the training set that are in the validation set, too.

    Args:
        train_set: whose pictures are in files.
        val_set: likewise.
        same_content: compare the files' contents, not only their paths.
        report: gets them.
    """
    seen = {key: index for index, key in _keys(train_set, same_content)}
    both = [(seen[key], index) for index, key in _keys(val_set, same_content) if key in seen]
    report.add_rows(
        "same image",
        both,
        lambda pair: val_set.image_name(pair[1]),
        lambda pair: f"{shown(str(val_set.image_files[pair[1]]))} is trained on, too: {train_set.image_name(pair[0])}",
    )


def _check_repeated(dataset: DetectionDataset, report: Report) -> None:
    """Report pictures that are listed under two names: the boxes of one are background of the other."""
    first: dict[str | bytes, int] = {}
    twice = [(first[key], index) for index, key in _keys(dataset, False) if first.setdefault(key, index) != index]
    report.add_rows(
        "same image",
        twice,
        lambda pair: dataset.image_name(pair[1]),
        lambda pair: f"{shown(str(dataset.image_files[pair[1]]))} stands there before: {dataset.image_name(pair[0])}",
    )


def check_before_training(train_set: DetectionDataset, val_set: DetectionDataset | None, strict: bool) -> None:
    """The cheap form: what is wrong is said before the first step, and stops the training where it is fatal.

    Raises:
        DataError: the message lists all that is fatal; `strict` makes all fatal that is more than a note.
    """
    report = check_dataset(train_set)
    if val_set is not None:
        report.merge(check_dataset(val_set, training=False))
        check_overlap(train_set, val_set, False, report)
    report.raise_errors(strict)
    if kinds := report.kinds(DROPPED, CLIPPED, WARNED):
        log.warning("%s", report.text(kinds, max_examples=3))


class _Look(NamedTuple):
    """What looking at one picture gave."""

    found: bool
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


def _missing(dataset: DetectionDataset, index: int) -> str:
    try:
        return f"there is no picture {shown(dataset.image_path(index))}"
    except UserError as error:
        return str(error).removeprefix(f"{dataset.image_name(index)}: ")


def _check_pictures(dataset: DetectionDataset, pictures: str, workers: int, report: Report) -> np.ndarray:
    """Look at the pictures; returns [num_images, 2] height and width, 0 where they are not known."""
    number = len(dataset)
    declared = dataset.declared_sizes
    depths = np.full(number, "none" if pictures == "none" else "headers", dtype=object)
    if pictures == "quick" and declared is not None:
        depths[:] = "none"
        depths[np.linspace(0, number - 1, min(number, QUICK_HEADERS)).astype(int)] = "headers"
    elif pictures == "decode":
        depths[:] = "decode"
    sizes = np.zeros((number, 2), dtype=np.int64) if declared is None else declared.copy()
    opened, missing = 0, []
    threads = workers if pictures == "decode" else 1  # the rest is Python, which threads only slow down
    for index, look in _map(lambda index: _look_at(dataset, index, depths[index]), number, threads):
        if not look.found:
            missing.append(index)
        if look.fault:
            report.add("unreadable image", dataset.image_name(index), look.fault)
        if look.header is None:
            continue
        where = dataset.image_name(index)
        opened += 1
        size, orientation = look.header[:2], look.header.orientation
        if orientation != 1 and valid_orientation(orientation) == 1:
            report.add("invalid EXIF orientation", where, f"{shown(orientation)}; the picture is taken as it is")
        elif orientation != 1:
            message = f"is turned upright by its EXIF orientation {orientation}; its boxes must fit the upright picture"
            report.add("EXIF rotation", where, message)
        if declared is not None and tuple(declared[index]) != size:
            _report_size(where, declared[index].tolist(), size, orientation, report)
        sizes[index] = size
    report.add_rows("missing image", missing, dataset.image_name, lambda index: _missing(dataset, index))
    if opened == number and declared is None:
        dataset.image_sizes = sizes
    return sizes


def _map(look: Callable[[int], _Look], number: int, workers: int) -> Iterator[tuple[int, _Look]]:
    indices = progress(range(number), "looking at pictures")
    if workers <= 1:
        yield from ((index, look(index)) for index in indices)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from zip(indices, pool.map(look, range(number)), strict=True)


def _report_size(where: str, declared: list[int], size: tuple[int, int], orientation: object, report: Report) -> None:
    height, width = declared
    message = f"is declared as {width} x {height}, but the file has {size[1]} x {size[0]} pixels, which count"
    if (width, height) == size:
        turned = valid_orientation(orientation) >= 5
        message += "; EXIF turns it: were its boxes drawn before?" if turned else "; are the two swapped?"
    report.add("declared size", where, message)


def _check_borders(dataset: DetectionDataset, sizes: np.ndarray, report: Report) -> None:
    """Report boxes that do not lie in their pictures, and what their numbers may mean instead."""
    image_index = dataset.image_index
    known = np.flatnonzero(sizes[image_index].all(axis=1))
    boxes, limits = dataset.annotations[known, :4], sizes[image_index[known]][:, ::-1]  # limits: width, height
    if not len(boxes):
        return

    def overhang(boxes: np.ndarray) -> np.ndarray:
        return np.maximum(-boxes[:, :2], boxes[:, 2:] - limits).max(axis=1)

    def show(row: int) -> str:
        x1, y1, x2, y2 = dataset.annotations[row, :4]
        return f"{x1:g},{y1:g},{x2:g},{y2:g} in a picture of {' x '.join(map(str, sizes[image_index[row]][::-1]))}"

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
    count = f"{beyond.sum():,} of {len(boxes):,} boxes pass the borders of their pictures"
    if (overhang(boxes[:, [1, 0, 3, 2]]) <= MARGIN).all():
        report.add("looks swapped", dataset.source, f"{count}, and none does with x and y swapped: is y written first?")
    corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    if dataset.box_format == "xywh" and (overhang(corners) <= MARGIN).all() and (corners[:, 2:] > corners[:, :2]).all():
        message = f"{count}, and none does if bbox is x1, y1, x2, y2; wanted is x, y, width, height"
        report.add("looks like x1, y1, x2, y2", dataset.source, message)


def _keys(dataset: DetectionDataset, same_content: bool) -> Iterator[tuple[int, str | bytes]]:
    """What tells the pictures that are there from each other."""
    for index in range(len(dataset)):
        path = dataset.find_image(index)
        if path is None:
            continue  # reported as missing
        if same_content:
            with contextlib.suppress(OSError):  # reported as unreadable
                yield index, hashlib.blake2b(Path(path).read_bytes()).digest()
        else:
            yield index, os.path.abspath(path)  # noqa: PTH100, several times as fast as pathlib


def summary(dataset: DetectionDataset) -> str:
    """What there is: images, boxes, and how many of each class."""
    per_image = np.diff(dataset.offsets)
    labels = dataset.annotations[:, 4].astype(np.int64)
    boxes = np.bincount(labels, minlength=dataset.num_classes())
    images = np.bincount(
        np.unique(dataset.image_index * dataset.num_classes() + labels) % dataset.num_classes(), minlength=len(boxes)
    )
    lines = [
        f"{dataset.source}: {len(dataset):,} images, {int((per_image == 0).sum()):,} of them without boxes; "
        f"{len(labels):,} boxes, at most {per_image.max()} in an image; {len(boxes):,} classes"
    ]
    most = np.argsort(-boxes, kind="stable")[:20]
    width = max(len(shown(dataset.label_to_name(label))) for label in most)
    lines += [
        f"  {shown(dataset.label_to_name(label)):{width}} {boxes[label]:9,} boxes in {images[label]:7,} images"
        for label in most
    ]
    if len(boxes) > len(most):
        lines.append(f"  ... and {len(boxes) - len(most):,} classes more")
    return "\n".join(lines)
