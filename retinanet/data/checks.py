"""Checks of a data set that go beyond its annotation files: `python -m retinanet check`.

The readers of the formats report what is wrong within the annotation files. This module compares the annotations with
their images, and the training set with the validation set. `train.py` runs the cheap checks before its first step.
"""

import contextlib
import csv
import hashlib
import os
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from retinanet.data.classes import class_difference
from retinanet.data.dataset import DetectionDataset
from retinanet.data.files import evenly, missing_folder
from retinanet.data.images import ImageHeader, read_header, read_image
from retinanet.data.placing import SOME_IMAGES, exceeds, overhang, place_boxes
from retinanet.data.report import MIN_SIDE, FileError, Report, counted
from retinanet.errors import UserError, output_file, shown
from retinanet.process import from_main_process, is_main_process, log, progress

# How thoroughly images are checked. none: whether the files exist; quick: also some headers, and those of images whose
# sizes the annotations do not declare; headers: all headers; decode: every pixel.
DEPTHS = ("none", "quick", "headers", "decode")
NOT_READ = ImageHeader(0, 0, 1)  # height, width and orientation of an image whose header is not read
MARGIN = 1  # pixels by which a box may exceed its image without being reported, because annotation tools round


def check_before_training(train_set: DetectionDataset, val_set: DetectionDataset | None, strict: bool) -> None:
    """Run the cheap checks before training: log warnings and raise fatal problems; with `strict`, all are fatal."""
    report = check_dataset(train_set)
    if val_set is not None:
        report.merge(check_dataset(val_set, training=False))
        compare_sets(train_set, val_set, False, report)
    report.raise_errors(strict)
    if kinds := report.warnings():
        log.warning("%s", report.text(kinds, max_examples=3))


def check_dataset(dataset: DetectionDataset, depth: str = "quick", training: bool = True, workers: int = 1) -> Report:
    """Report what is wrong with a data set and its annotation files; `workers` threads decode images.

    `depth` is one of DEPTHS. With `training`, classes without boxes are reported, too.
    """
    report = Report(skip_bad=dataset.report.skip_bad)
    if dataset.in_files:
        _check_images(dataset, depth, workers, report)
        _check_repeated(dataset, report)
    report.merge(dataset.report)
    _check_borders(dataset, report)
    counts = np.bincount(dataset.annotations[:, 4].astype(np.int64), minlength=dataset.num_classes())
    if not counts.any():
        if training:
            report.add("no boxes", dataset.source, "has no boxes to learn from")
        else:
            report.add("no validation boxes", dataset.source, "has no boxes, so AP cannot be measured")
    elif training:
        unused = [shown(dataset.label_to_name(label)) for label in np.flatnonzero(counts == 0)]
        report.add_rows("unused class", unused, lambda _: dataset.source, lambda name: f"no box has class {name}")
    return report


def compare_sets(train_set: DetectionDataset, val_set: DetectionDataset, same_content: bool, report: Report) -> None:
    """Report classes that the two sets do not share, and images that they do: the same file or, if asked, content."""
    names, val_names = list(train_set.labels.values()), list(val_set.labels.values())
    if difference := class_difference("the training set", names, "the validation set", val_names):
        report.add("different classes", val_set.source, difference)
    seen = {key: index for index, key in _keys(train_set, same_content)}
    both = [(index, seen[key]) for index, key in _keys(val_set, same_content) if key in seen]
    if both:
        verb = "is" if len(both) == 1 else "are"
        share = f"{len(both):,} of {counted(len(val_set), 'image')} of the validation set {verb} also trained on"
        report.add("leak", val_set.source, share, count=0)
    for index, other in both:
        message = f"{shown(str(val_set.image_files[index]))} is trained on, too: {train_set.image_name(other)}"
        report.add("leak", val_set.image_name(index), message)


def _check_repeated(dataset: DetectionDataset, report: Report) -> None:
    """Report images that are listed under two names: the boxes of one are background in the other."""
    first: dict[Hashable, int] = {}
    for index, key in _keys(dataset, False):
        if (other := first.setdefault(key, index)) != index:
            message = f"{shown(str(dataset.image_files[index]))} repeats {dataset.image_name(other)}"
            report.add("repeated image", dataset.image_name(index), message)


def _keys(dataset: DetectionDataset, same_content: bool) -> Iterator[tuple[int, Hashable]]:
    """The index of each image whose file exists, with a key: the file behind all links, or a hash of its content."""
    for index in range(len(dataset) if dataset.in_files else 0):
        with contextlib.suppress(OSError):  # reported as unreadable
            if (path := dataset.find_image(index)) is None:
                continue
            if same_content:
                digest = hashlib.blake2b()
                with open(path, "rb") as file:
                    while block := file.read(2**20):  # an orthophoto may be as large as the memory
                        digest.update(block)
                yield index, digest.digest()
            else:
                status = os.stat(path)  # noqa: PTH116, pathlib takes several times as long
                yield index, (status.st_dev, status.st_ino)


def leave_out_bad_images(dataset: DetectionDataset, workers: int) -> None:
    """Decode all images and leave out those that are missing, unreadable or not the annotated ones.

    Raises:
        UserError: none would be left.
    """
    if dataset.in_files:
        bad = _check_images(dataset, "decode", workers, dataset.report) | dataset.misfit
        if bad.all():
            raise UserError(f"{dataset.source}: none of its {counted(len(dataset), 'image')} can be read")
        dataset.select_images(~bad)


def write_skipped(folder: Path | None, datasets: Iterable[DetectionDataset | None]) -> None:
    """List what was left out of data sets in `skipped.csv` in a folder, and log how much that is."""
    rows = [(dataset.source, *problem) for dataset in datasets if dataset for problem in dataset.report.skipped]
    if not rows:
        return
    path = "--out"
    if folder is not None:
        path = output_file(folder / "skipped.csv")
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file, lineterminator="\n").writerows([("file", "where", "reason"), *rows])
    what = "1 bad image or annotation was" if len(rows) == 1 else f"{len(rows):,} bad images and annotations were"
    log.warning("%s left out; %s lists them", what, path)


def _look_at(dataset: DetectionDataset, index: int, header: bool, pixels: bool) -> tuple[str, str, ImageHeader]:
    """What kind of problem an image has ("" for none), the reason, and the image's header."""
    if (path := dataset.find_image(index)) is None:
        return "missing image", "", NOT_READ
    try:
        found = read_header(path, dataset.pixel_limit) if header else NOT_READ
        if pixels:
            read_image(path, dataset.pixel_range, dataset.pixel_limit)
    except FileError as error:
        return "unreadable image", str(error), NOT_READ
    return "", "", found


def _check_images(dataset: DetectionDataset, depth: str, workers: int, report: Report) -> np.ndarray:
    """Check the image files; returns [I] bool: which are bad."""
    number, pixels = len(dataset), depth == "decode"
    wanted = ~dataset.headers_read & (depth != "none")  # headers to read
    if depth == "quick":
        wanted &= ~dataset.known_sizes.all(axis=1) | np.isin(np.arange(number), evenly(range(number), SOME_IMAGES))
    looks = []
    if is_main_process():  # Only decoding gains from threads: the rest is pure Python.
        with ThreadPoolExecutor(max(workers, 1) if pixels else 1) as pool:
            looks = pool.map(lambda index: _look_at(dataset, index, wanted[index], pixels), range(number))
            looks = list(progress(looks, "checking images", number))
    looks = from_main_process(looks)
    headers = np.array([header for *_, header in looks], dtype=np.int64).reshape(-1, 3)
    place_boxes(dataset, headers[:, :2], headers[:, 2])
    kinds = np.array([kind for kind, *_ in looks], dtype=object)

    def folder(index: int) -> str | None:
        return missing_folder(dataset.expected_path(index)) or None

    report.add_rows("missing image", kinds == "missing image", dataset.image_name, dataset.explain_missing, folder)
    report.add_rows("unreadable image", kinds == "unreadable image", dataset.image_name, lambda index: looks[index][1])
    return kinds != ""


def _check_borders(dataset: DetectionDataset, report: Report) -> None:
    """Report boxes outside their images, and whether another box format would explain the numbers."""
    sizes = dataset.known_sizes
    known = np.flatnonzero(sizes[dataset.image_index].all(axis=1))
    boxes, limits = dataset.annotations[known, :4], sizes[dataset.image_index[known]]  # limits: height, width
    if not len(boxes):
        return

    def show(row: int) -> str:
        height, width = sizes[dataset.image_index[row]]
        numbers = ",".join(f"{number:g}" for number in dataset.annotations[row, :4])
        return f"{numbers} in an image of {width} x {height}"

    clipped = boxes.clip(0, np.tile(limits[:, ::-1], 2))
    sides = clipped[:, 2:] - clipped[:, :2]
    outside = (sides < MIN_SIDE).any(axis=1)
    beyond = overhang(boxes, limits) > MARGIN
    partly, name = known[beyond & ~outside], dataset.annotation_name
    report.add_rows("box outside", known[outside], name, lambda row: f"the box lies outside: {show(row)}")
    report.add_rows("box partly outside", partly, name, lambda row: f"the box is partly outside: {show(row)}")
    few, far = max(2, len(boxes) / 20), exceeds(boxes, limits)
    if far.sum() <= few:
        return
    # Annotators may draw a box beyond the border, but hardly one of which more than half of the area is outside.
    lost = sides.prod(axis=1) < (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) / 2
    readings = [("looks swapped", boxes[:, [1, 0, 3, 2]], "with x and y swapped: is y written first?")]
    if dataset.is_coco and dataset.affine is None:
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        message = "if bbox is read as x1, y1, x2, y2; it must be x, y, width, height"
        readings.append(("looks like x1, y1, x2, y2", corners, message))
    count = f"{far.sum():,} of {len(boxes):,} boxes exceed the borders of their images, but none does"
    for kind, reading, message in readings:
        if (overhang(reading, limits) <= MARGIN).all() and (reading[:, 2:] > reading[:, :2]).all():
            report.add("guess" if lost.sum() <= few else kind, dataset.source, f"{count} {message}")


def summary(dataset: DetectionDataset) -> str:
    """The numbers of images and boxes, in total and for each class."""
    per_image, labels = np.diff(dataset.offsets), dataset.annotations[:, 4].astype(np.int64)
    boxes = np.bincount(labels, minlength=dataset.num_classes())
    images = np.bincount(np.unique(dataset.image_index * len(boxes) + labels) % len(boxes), minlength=len(boxes))
    lines = [
        f"{dataset.source}: {counted(len(dataset), 'image')}, {int((per_image == 0).sum()):,} of them without boxes; "
        f"{counted(len(labels), 'box')}, at most {per_image.max(initial=0)} in an image; {counted(len(boxes), 'class')}"
    ]
    most = {label: shown(dataset.label_to_name(label)) for label in np.argsort(-boxes, kind="stable")[:20]}
    width = max(map(len, most.values()), default=0)
    for label, name in most.items():
        lines.append(f"  {name:{width}} {counted(boxes[label], 'box'):>15} in {counted(images[label], 'image'):>14}")
    if len(boxes) > len(most):
        lines.append(f"  ... and {len(boxes) - len(most):,} more classes")
    return "\n".join(lines)
