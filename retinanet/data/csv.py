"""CSV files of boxes, one a line: a data set, and its reader.

Rows are converted some hundreds at a time, column by column; they are looked at one by one only where that fails.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import explain_missing
from retinanet.data.reading import MAX_NAME, check_boxes, unknown_class
from retinanet.data.report import Report
from retinanet.data.tables import NO_CLASS, look_closer, read_header, read_rows, to_columns
from retinanet.errors import UserError, shown

UNKNOWN, NEGATIVE = -1, -2  # in place of a label: a class that is not in the list; a line without a box


class Boxes(NamedTuple):
    """What a CSV file says."""

    image_files: list[str]  # path of each image, in the order of their first lines
    image_lines: np.ndarray  # [I] int: these lines, from 1
    sizes: np.ndarray  # [I, 2] int: height and width; 0 where the file does not say
    annotations: np.ndarray  # [N, 5] float64 (x1, y1, x2, y2, label)
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
        report = Report() if report is None else report
        if class_list is not None:
            class_names = read_classes(Path(class_list), report)
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
            declared_sizes=boxes.sizes if boxes.sizes.any() else None,
        )

    def image_name(self, index: int) -> str:
        """The CSV file and the image's first line there."""
        return f"{self.train_file}:{self.image_lines[index]}"

    def annotation_name(self, row: int) -> str:
        """The CSV file and the box's line there."""
        return f"{self.train_file}:{self.annotation_ids[row]}"

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
    """Read a CSV file of boxes.

    Args:
        path: the file.
        class_names: name of each label; None: the classes of the file, sorted.
        report: gets what is wrong; where it holds no errors, the annotations are good.

    Raises:
        UserError: the file is missing, empty, or not a CSV file in UTF-8, or its header lacks columns.
    """
    labels = {name: label for label, name in enumerate(class_names or ())}
    label_of = {NO_CLASS: NEGATIVE}  # of each class as it is written
    positions: dict[str, int] = {}  # of each image's path, from the working directory or the root
    image_files: list[str] = []
    position_of: dict[str, int] = {}  # of each path as it is written
    folder = os.path.abspath(path.parent)  # noqa: PTH100

    def new_image(name: str, where: Callable[[], str]) -> int:
        key = name and os.path.normpath(os.path.join(folder, name))  # noqa: PTH118
        position = positions.setdefault(key, len(positions))
        if position == len(image_files):
            image_files.append(name)
        elif image_files[position] != name:
            report.add("repeated image", where(), f"{shown(name)} is {shown(image_files[position])}, and read once")
        return position

    def new_class(name: str, _: Callable[[], str]) -> int:
        return labels.setdefault(name, len(labels)) if class_names is None and name else labels.get(name, UNKNOWN)

    layout = None
    parts = [(np.zeros((0, 4)), *[np.zeros(0, dtype=np.int64)] * 3, np.zeros((0, 2), dtype=np.int64))]
    for numbers, rows in read_rows(path, 6, report):
        layout = layout or read_header(path, numbers, rows, report)
        try:
            names, boxes, classes, sizes = to_columns(rows, layout)
        except ValueError:
            numbers, rows = look_closer(path, numbers, rows, layout, report)
            if not rows:
                continue
            names, boxes, classes, sizes = to_columns(rows, layout)

        def where(row: int, numbers: Sequence[int] = numbers) -> str:
            return f"{path}:{numbers[row]}"

        empty = np.isnan(boxes).all(axis=1) | (boxes == 0).all(axis=1)
        if empty.any():
            report.add_rows(
                *("no objects", [row for row in np.flatnonzero(empty) if classes[row] != NO_CLASS], where),
                lambda _: "is read as an image without objects, whose line is best written `path,,,,,`",
                lambda _: "",
            )
            classes = [NO_CLASS if is_empty else name for name, is_empty in zip(classes, empty, strict=True)]
        image_index = _encode(names, position_of, new_image, where, report)
        label = _encode(classes, label_of, new_class, where, report)
        report.add_rows(
            *("unknown class", np.flatnonzero(label == UNKNOWN), where),
            lambda row, classes=classes: unknown_class(classes[row], list(labels)),
            lambda row, classes=classes: classes[row].strip(),
        )
        parts.append((boxes, label, image_index, np.asarray(numbers), sizes))
    if not positions and not report.errors():
        raise UserError(f"{path}: lists no images")
    boxes, label, image_index, lines, sizes = map(np.concatenate, zip(*parts, strict=True))
    first = np.unique(image_index, return_index=True)[1]
    image_lines = lines[first]
    if "" in positions:
        report.add("bad name", f"{path}:{image_lines[positions['']]}", "the image's path is empty")
    if class_names is None:
        class_names = sorted(labels)
        order = np.array([class_names.index(name) for name in labels], dtype=np.int64)
        label[label >= 0] = order[label[label >= 0]]
    has_box = label != NEGATIVE
    report.add_rows(
        *("negative with boxes", np.intersect1d(image_index[has_box], image_index[~has_box])),
        lambda index: f"{path}:{image_lines[index]}",
        lambda index: f"{shown(image_files[index])} has a line without a box, and others with boxes, which count",
    )
    boxes, label, image_index, lines = (column[has_box] for column in (boxes, label, image_index, lines))
    kept = check_boxes(report, boxes, label, image_index, lambda row: f"{path}:{lines[row]}") & (label != UNKNOWN)
    if layout and not layout.header:
        _check_corners(path, boxes, report)
    annotations = np.column_stack([boxes, label])[kept]
    return Boxes(image_files, image_lines, sizes[first], annotations, image_index[kept], lines[kept], [*class_names])


def _encode(
    texts: Sequence[str],
    codes: dict[str, int],
    new_code: Callable[[str, Callable[[], str]], int],
    where: Callable[[int], str],
    report: Report,
) -> np.ndarray:
    """The codes [n] of texts; new ones get theirs, without the spaces around them, from `new_code`."""
    for text in dict.fromkeys(texts):
        if text in codes:
            continue

        def place(text: str = text) -> str:
            return where(texts.index(text))

        codes[text] = new_code(text.strip(), place)
        if len(text) > MAX_NAME:
            report.add("bad name", place(), f"{shown(text)} has {len(text):,} characters, more than {MAX_NAME:,}")
        elif text != text.strip():
            report.add("spaces", place(), f"the spaces around {shown(text)} are ignored")
    return np.fromiter(map(codes.__getitem__, texts), np.int64, len(texts))


def _check_corners(path: Path, boxes: np.ndarray, report: Report) -> None:
    """Report so many inverted boxes that they must be x, y, width, height."""
    inverted = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    count = int(inverted.sum())
    if count > max(1, len(boxes) / 20) and (boxes[inverted] >= 0).all() and (boxes[inverted, 2:] > 0).all():
        message = f"{count:,} of {len(boxes):,} boxes have x2 <= x1 or y2 <= y1, but must be the corners x1,y1,x2,y2"
        report.add("looks like x, y, width, height", str(path), message)


def read_classes(path: Path, report: Report) -> list[str]:
    """Class names in the order of their ids, from `class_name,id` lines.

    Raises:
        UserError: the file is missing, empty, or not a CSV file in UTF-8.
        DataError: classes are wrong; without them, reading the boxes would only repeat it.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    for numbers, rows in read_rows(path, 2, report):
        for number, fields in zip(numbers, rows, strict=True):
            row, where = [field.strip() for field in fields], f"{path}:{number}"
            if not any(row):
                continue
            if len(row) != 2:
                message = f"expected `class_name,id`, found {len(row)} columns"
            elif not (row[1].isascii() and row[1].isdecimal() and len(row[1]) < 10):
                if not names and not report.errors() and row[1].lower() in ("id", "class_id", "label", "index"):
                    report.add("header row", where, f"{shown(','.join(row))} are column names: line skipped")
                    continue
                hint = " (are the two columns swapped?)" if row[0].isdecimal() else ""
                message = f"the class id must be a whole number, not {shown(row[1])}{hint}"
            elif row[0] in taken or int(row[1]) in names or not row[0]:
                message = f"class {shown(row[0])} or its id {row[1]} is repeated, or the class has no name"
            else:
                names[int(row[1])] = row[0]
                taken.add(row[0])
                continue
            report.add("class list", where, message)
    ids = sorted(names)
    if not report.errors() and (not ids or ids != list(range(len(ids)))):
        report.add("class list", str(path), f"class ids must run from 0 without gaps, found {shown(ids)}")
    report.raise_errors()
    return [names[label] for label in ids]
