"""CSV files with one box per line: path, x1, y1, x2, y2, class name; or with columns that a header names.

    images/a.jpg,10,20,110,220,car
    images/a.jpg,30,40,60,90,person
    images/b.jpg,,,,,

An image without objects, such as the last one, has one line without a box.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from retinanet.data.classes import read_class_ids, unknown_class
from retinanet.data.dataset import DetectionDataset
from retinanet.data.files import explain_missing
from retinanet.data.reading import MAX_NAME
from retinanet.data.report import DataError, Report
from retinanet.data.tables import Table, read_table
from retinanet.errors import shown


class CSVDataset(DetectionDataset):
    """A data set in a CSV file, in the format of keras-retinanet, the original, TensorFlow, Roboflow or DeepForest.

    Args:
        train_file: the file. Relative paths in it start at its folder, or else at the working directory.
        class_list: a file of the classes with lines `class_name,id`, ids from 0.
        transform: sample -> sample.
        class_names: used instead of `class_list`; default: the classes of `train_file`, sorted.
        report: collects the problems.
    """

    per_image = (*DetectionDataset.per_image, "image_lines")
    annotation_format = "{}:{}"

    def __init__(
        self,
        train_file: str | Path,
        class_list: str | Path | None = None,
        transform: Callable[[dict], dict] | None = None,
        class_names: Sequence[str] | None = None,
        report: Report | None = None,
    ):
        self.train_file = path = Path(train_file)
        self.image_folders = (str(path.parent), "")
        report = report or Report()
        if class_list is not None:
            class_names = read_class_ids(Path(class_list), report)
        if class_names is not None and not len(class_names):
            report.add("no boxes", str(path), "has no known class, because the training set has no boxes")
            raise DataError(report)
        table = read_table(path, report)
        class_names = table.class_names() if class_names is None else class_names
        labels = _find_labels(table, class_names, report)
        image_files, image_index = _find_images(table, report)
        first = _first_rows(image_index, len(image_files))
        report.add_rows(
            "negative with boxes",
            np.intersect1d(image_index[table.has_box], image_index[~table.has_box]),
            lambda index: table.where(first[index]),
            lambda index: f"{shown(image_files[index])} has lines with and without boxes; the boxes are used",
        )
        if not table.has_header:
            _check_corners(path, table.boxes[table.has_box], report)
        sizes = np.zeros((len(image_files), 2), dtype=np.int64)
        sized = np.flatnonzero((table.sizes > 0).all(axis=1))[::-1]  # reversed, so that an image's first row wins
        sizes[image_index[sized]] = table.sizes[sized]
        self.image_lines = table.lines[first]
        super().__init__(
            image_files,
            np.column_stack([table.boxes, labels])[table.has_box],
            image_index[table.has_box],
            class_names,
            transform,
            annotation_ids=table.lines[table.has_box],
            report=report,
            source=path,
            declared_sizes=sizes,
        )

    def image_name(self, index: int) -> str:
        """The CSV file and the image's first line there."""
        return self.annotation_format.format(self.train_file, self.image_lines[index])

    def explain_missing(self, index: int) -> str:
        """Why `find_image` finds nothing, for messages."""
        folder = self.image_folders[0]
        start = f"relative paths start at {folder}, or else at the working directory"
        return f"{explain_missing(str(self.image_files[index]), folder)} ({start})"


def _find_labels(table: Table, class_names: Sequence[str], report: Report) -> np.ndarray:
    """[N] the label of each row; -1 for unknown classes, which are reported if they have a box."""
    rows, codes = np.flatnonzero(table.has_box), table.class_codes
    _check_texts(table.classes, codes[rows], lambda row: table.where(rows[row]), report)
    names = [text.strip() for text in table.classes]
    known = {name: label for label, name in enumerate(class_names)}
    labels = np.array([known.get(name, -1) for name in names], dtype=np.int64)[codes]
    report.add_rows(
        "unknown class",
        table.has_box & (labels < 0),
        table.where,
        lambda row: unknown_class(names[codes[row]], class_names),
        lambda row: names[codes[row]],
    )
    return labels


def _find_images(table: Table, report: Report) -> tuple[list[str], np.ndarray]:
    """The paths of the images, each image once, and [N] the index of each row's image."""
    folder = os.path.abspath(table.path.parent)  # noqa: PTH100
    positions: dict[str, int] = {}  # absolute path -> index of the image
    files, found = [], []
    first = _check_texts(table.paths, table.path_codes, table.where, report)
    for name, row in zip(map(str.strip, table.paths), first, strict=True):
        key = name and os.path.normpath(os.path.join(folder, name))  # noqa: PTH118
        index = positions.setdefault(key, len(files))
        found.append(index)
        if index == len(files):
            files.append(name)
            if not name:
                report.add("bad name", table.where(row), "the image's path is empty")
        elif files[index] != name:
            report.add("repeated image", table.where(row), f"{shown(name)} is {shown(files[index])}, and is read once")
    return files, np.array(found, dtype=np.int64)[table.path_codes]


def _check_texts(texts: Sequence[str], codes: np.ndarray, where: Callable[[int], str], report: Report) -> np.ndarray:
    """Report texts that are too long or have spaces around them; returns the first row of each text."""
    first = _first_rows(codes, len(texts))
    for text, row in zip(texts, first, strict=True):
        if row < len(codes) and len(text) > MAX_NAME:
            report.add("bad name", where(row), f"{shown(text)} has {len(text):,} characters, more than {MAX_NAME:,}")
        elif row < len(codes) and text != text.strip():
            report.add("spaces", where(row), f"the spaces around {shown(text)} are ignored")
    return first


def _first_rows(codes: np.ndarray, number: int) -> np.ndarray:
    """[number] the first row of each code; len(codes) for a code without a row."""
    first = np.full(number, len(codes))
    np.minimum.at(first, codes, np.arange(len(codes)))
    return first


def _check_corners(path: Path, boxes: np.ndarray, report: Report) -> None:
    """Report x, y, width, height in place of corners, if so many boxes are inverted that nothing else explains it."""
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    count = int(inverted.sum())
    explained = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    if count > max(1, len(boxes) / 10) and explained[inverted].all() and explained.mean() > 0.95:
        message = f"{count:,} of {len(boxes):,} boxes have x2 < x1 or y2 < y1, but must be the corners x1,y1,x2,y2"
        report.add("looks like x, y, width, height", str(path), message)
