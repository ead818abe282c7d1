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
from retinanet.data.report import DataError, Report
from retinanet.data.tables import Table, first_rows, read_table
from retinanet.errors import shown


class CSVDataset(DetectionDataset):
    """A data set in a CSV file, in the format of keras-retinanet, the original, TensorFlow, Roboflow or DeepForest.

    Args:
        train_file: the file. Relative paths in it start at its folder, or else at the working directory.
        class_list: a file of the classes with lines `class_name,id`, ids from 0.
        class_names: used instead of `class_list`; default: the classes of `train_file`, sorted.
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
        first = first_rows(image_index, len(image_files))
        report.add_rows(
            "negative with boxes",
            np.intersect1d(image_index[table.has_box], image_index[~table.has_box]),
            lambda index: table.where(first[index]),
            lambda index: f"{shown(image_files[index])} has lines with and without boxes; the boxes are used",
        )
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
    known = {name: label for label, name in enumerate(class_names)}
    labels = np.array([known.get(name, -1) for name in table.classes], dtype=np.int64)[table.class_codes]

    def explain(row: int) -> str:
        return unknown_class(table.class_name(row), class_names)

    report.add_rows("unknown class", table.has_box & (labels < 0), table.where, explain, table.class_name)
    return labels


def _find_images(table: Table, report: Report) -> tuple[list[str], np.ndarray]:
    """The paths of the images, each image once, and [N] the index of each row's image."""
    folder = os.path.abspath(table.path.parent)  # noqa: PTH100
    positions: dict[str, int] = {}  # absolute path -> index of the image
    files, found = [], []
    for name, row in zip(table.paths, first_rows(table.path_codes, len(table.paths)), strict=True):
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
