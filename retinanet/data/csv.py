"""CSV files of boxes, one a line: a data set, and its reader."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.classes import read_class_ids, unknown_class
from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import explain_missing
from retinanet.data.reading import MAX_NAME
from retinanet.data.report import DataError, Report
from retinanet.data.tables import NO_CLASS, read_table
from retinanet.errors import UserError, shown


class Boxes(NamedTuple):
    """What a CSV file says."""

    image_files: list[str]  # path of each image, in the order of their first lines
    image_lines: np.ndarray  # [I] int: these lines, from 1
    sizes: np.ndarray  # [I, 2] int: height and width; 0 where the file does not say
    annotations: np.ndarray  # [N, 5] float64 (x1, y1, x2, y2, label); label -1: a class that is not in the list
    image_index: np.ndarray  # [N] int: the image of each annotation
    lines: np.ndarray  # [N] int: the line of each annotation
    class_names: list[str]


class CSVDataset(DetectionDataset):
    """A data set in a CSV file, as keras-retinanet and the original, TensorFlow, Roboflow or DeepForest write it.

    Args:
        train_file: one box a line, `path,x1,y1,x2,y2,class_name`, or in columns that a header names; an image without
            boxes has one line `path,,,,,`. Relative paths start at this file's folder, or else at the working
            directory.
        class_list: one class a line, `class_name,id`, ids from 0.
        transform: sample -> sample.
        class_names: in place of `class_list`; default: the classes of `train_file`, sorted.
        report: gets what is wrong.

    Raises:
        UserError: a file is missing, or lines are wrong; the message lists them all, with file and line.
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
        self.train_file = Path(train_file)
        self.folder = str(self.train_file.parent)
        report = report or Report()
        if class_list is not None:
            class_names = read_class_ids(Path(class_list), report)
        boxes = read_boxes(self.train_file, class_names, report)
        self.image_lines = boxes.image_lines
        super().__init__(
            boxes.image_files,
            boxes.annotations,
            boxes.image_index,
            boxes.class_names,
            transform,
            annotation_ids=boxes.lines,
            report=report,
            source=self.train_file,
            declared_sizes=boxes.sizes,
        )

    def image_name(self, index: int) -> str:
        """The CSV file and the image's first line there."""
        return f"{self.train_file}:{self.image_lines[index]}"

    def expected_path(self, index: int) -> str:
        """The image's file, relative to the CSV file."""
        return os.path.join(self.folder, str(self.image_files[index]))  # noqa: PTH118, pathlib takes several times as long

    def find_image(self, index: int) -> str | None:
        """The image's file: relative to the CSV file, or else the path as it is; None where neither exists."""
        paths = self.expected_path(index), str(self.image_files[index])
        return next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113

    def explain_missing(self, index: int) -> str:
        """Why `find_image` finds nothing."""
        start = f"relative paths start at {self.folder}, or else at the working directory"
        return f"{explain_missing(str(self.image_files[index]), self.folder)} ({start})"

    def image_path(self, index: int) -> str:
        """The image's file.

        Raises:
            UserError: it does not exist; the message names the line that lists it.
        """
        path = self.find_image(index)
        if path is None:
            raise UserError(f"{self.image_name(index)}: {self.explain_missing(index)}")
        return path


def read_boxes(path: Path, class_names: Sequence[str] | None, report: Report) -> Boxes:
    """Read a CSV file of boxes; `class_names` None: its own classes, sorted.

    Raises:
        UserError: the file is missing, empty, or not a CSV file in UTF-8, or its header lacks columns.
    """
    if class_names is not None and not len(class_names):
        report.add("no boxes", str(path), "has no known class, because the training set has no boxes")
        raise DataError(report)
    table = read_table(path, report)
    boxes, lines = table.boxes, table.lines
    if not len(lines) and not report.errors():
        raise UserError(f"{path}: lists no images")

    def where(row: int) -> str:
        return f"{path}:{lines[row]}"

    has_box = ~(np.isnan(boxes).all(axis=1) | (boxes == 0).all(axis=1) | (boxes == -1).all(axis=1))
    named = np.array([text != NO_CLASS for text in table.classes], dtype=bool)[table.class_codes]
    message = "is read as an image without objects, whose line is best written `path,,,,,`"
    report.add_rows("no objects", np.flatnonzero(~has_box & named), where, message, "")

    used = table.class_codes[has_box]
    _check_texts(table.classes, used, lambda row: where(np.flatnonzero(has_box)[row]), report)
    names = [text.strip() for text in table.classes]
    if class_names is None:
        class_names = sorted({names[code] for code in np.flatnonzero(np.bincount(used))} - {""})
    labels = {name: label for label, name in enumerate(class_names)}
    label = np.array([labels.get(name, -1) for name in names], dtype=np.int64)[table.class_codes]
    unknown = np.flatnonzero(has_box & (label < 0))
    known = list(labels)
    report.add_rows(
        *("unknown class", unknown, where),
        lambda row: unknown_class(names[table.class_codes[row]], known),
        lambda row: names[table.class_codes[row]],
    )

    image_files, images = _find_images(path, table.paths, table.path_codes, where, report)
    image_index = images[table.path_codes]
    first = _first_rows(image_index, len(image_files))
    report.add_rows(
        *("negative with boxes", np.intersect1d(image_index[has_box], image_index[~has_box])),
        lambda index: where(first[index]),
        lambda index: f"{shown(image_files[index])} has a line without a box, and others with boxes, which count",
    )
    annotations = np.column_stack([boxes, label])[has_box]
    if not table.has_header:
        _check_corners(path, annotations[:, :4], report)
    message = "height or width is not a whole number of pixels; the image file's counts"
    report.add_rows("declared size", np.flatnonzero((table.sizes < 0).any(axis=1)), where, message, "")
    sizes = np.zeros((len(image_files), 2), dtype=np.int64)
    sized = np.flatnonzero((table.sizes > 0).all(axis=1))[::-1]  # the first one of an image is written last
    sizes[image_index[sized]] = table.sizes[sized]
    image_index, box_lines = image_index[has_box], lines[has_box]
    return Boxes(image_files, lines[first], sizes, annotations, image_index, box_lines, [*class_names])


def _find_images(
    path: Path, texts: Sequence[str], codes: np.ndarray, where: Callable[[int], str], report: Report
) -> tuple[list[str], np.ndarray]:
    """The images that paths lead to, each once, and the position among them of each path."""
    folder = os.path.abspath(path.parent)  # noqa: PTH100
    positions: dict[str, int] = {}  # of each path from the root
    files, found, repeated = [], [], []
    for code, name in enumerate(map(str.strip, texts)):
        key = name and os.path.normpath(os.path.join(folder, name))  # noqa: PTH118
        found.append(positions.setdefault(key, len(files)))
        if found[-1] == len(files):
            files.append(name)
        elif files[found[-1]] != name:
            repeated.append(code)
    first = _check_texts(texts, codes, where, report)
    if "" in positions:
        empty = next(code for code, text in enumerate(texts) if not text.strip())
        report.add("bad name", where(first[empty]), "the image's path is empty")
    report.add_rows(
        *("repeated image", repeated, lambda code: where(first[code])),
        lambda code: f"{shown(texts[code].strip())} is {shown(files[found[code]])}, and read once",
    )
    return files, np.array(found, dtype=np.int64)


def _check_texts(texts: Sequence[str], codes: np.ndarray, where: Callable[[int], str], report: Report) -> np.ndarray:
    """Report texts that are too long or have spaces around them; returns the first row of each."""
    first = _first_rows(codes, len(texts))
    for code in np.flatnonzero(first < len(codes)):
        if len(text := texts[code]) > MAX_NAME:
            message = f"{shown(text)} has {len(text):,} characters, more than {MAX_NAME:,}"
            report.add("bad name", where(first[code]), message)
        elif text != text.strip():
            report.add("spaces", where(first[code]), f"the spaces around {shown(text)} are ignored")
    return first


def _first_rows(codes: np.ndarray, number: int) -> np.ndarray:
    """[number] the first row of each code; len(codes) where it is in none."""
    first = np.full(number, len(codes))
    np.minimum.at(first, codes, np.arange(len(codes)))
    return first


def _check_corners(path: Path, boxes: np.ndarray, report: Report) -> None:
    """Report so many inverted boxes that they must be x, y, width, height."""
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(axis=1)
    count = int(inverted.sum())
    explained = (boxes[:, :2] >= 0).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    if count > max(1, len(boxes) / 10) and explained[inverted].all() and explained.mean() > 0.95:
        message = f"{count:,} of {len(boxes):,} boxes have x2 < x1 or y2 < y1, but must be the corners x1,y1,x2,y2"
        report.add("looks like x, y, width, height", str(path), message)
