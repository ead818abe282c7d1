"""The two CSV files of a data set: boxes and classes -> arrays, with a report of what is wrong.

Rows are converted some hundreds at a time, column by column; only where that fails is each row looked at.
"""

import csv
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.reading import MAX_NAME, check_boxes, read_text, unknown_class
from retinanet.data.report import Report
from retinanet.errors import UserError, shown

CHUNK_ROWS = 500  # few enough that a chunk's strings stay in the cache
UNKNOWN, NEGATIVE = -1, -2  # in place of a label: a class that is not in the list; a line without a box
NO_CLASS = "\0"  # in place of a negative's class: no text that is read holds it


class CsvBoxes(NamedTuple):
    """What a CSV file says.

    Attributes:
        image_files: the paths, as they stand there, in the order of their first lines.
        image_lines: [num_images] int: the first line of each, from 1.
        rows: [N, 5] float64 (x1, y1, x2, y2, label).
        image_index: [N] int: the image of each row.
        lines: [N] int: the line of each row, from 1.
    """

    image_files: list[str]
    image_lines: np.ndarray
    annotations: np.ndarray
    image_index: np.ndarray
    lines: np.ndarray


def read_boxes(path: Path, class_names: Sequence[str], report: Report) -> CsvBoxes:
    """Read `path,x1,y1,x2,y2,class_name` lines; a picture without boxes has one line `path,,,,,`.

    Args:
        path: the file.
        class_names: name of each label.
        report: gets what is wrong; where it holds no errors, the rows are good.

    Raises:
        UserError: the file is missing, empty, or no CSV file in UTF-8.
    """
    text = _read_text(path, report)
    labels = {name: label for label, name in enumerate(class_names)}
    label_of = {NO_CLASS: NEGATIVE}  # of each class as it is written
    positions: dict[str, int] = {}  # of each image
    position_of: dict[str, int] = {}  # the same, of each path as it is written
    parts = []
    for numbers, rows in _chunks(path, text, _separator(path, text, 6, report)):
        try:
            names, boxes, classes = _columns(rows)
        except ValueError:
            numbers, rows = _look_closer(path, numbers, rows, report)
            if not rows:
                continue
            names, boxes, classes = _columns(rows)
        for name in dict.fromkeys(names):
            if name not in position_of:
                position_of[name] = positions.setdefault(name.strip(), len(positions))
                _check_spelling(path, numbers, names, name, report)
                if not name.strip():
                    report.add("bad name", f"{path}:{numbers[names.index(name)]}", "the image's path is empty")
        for name in dict.fromkeys(classes):
            if name not in label_of:
                label_of[name] = labels.get(name.strip(), UNKNOWN)
                _check_spelling(path, numbers, classes, name, report)
        label = np.fromiter(map(label_of.__getitem__, classes), np.int64, len(classes))
        report.add_rows(
            "unknown class",
            np.flatnonzero(label == UNKNOWN),
            lambda row, numbers=numbers: f"{path}:{numbers[row]}",
            lambda row, classes=classes: unknown_class(classes[row], class_names),
        )
        image_index = np.fromiter(map(position_of.__getitem__, names), np.int64, len(names))
        parts.append((boxes, label, image_index, np.asarray(numbers)))
    if not parts and not report.errors():
        raise UserError(f"{path}: lists no images")
    empty = np.zeros((0, 4)), *[np.zeros(0, dtype=np.int64)] * 3
    boxes, label, image_index, lines = (np.concatenate(column) for column in zip(empty, *parts, strict=True))
    image_lines = lines[np.unique(image_index, return_index=True)[1]]
    has_box = label != NEGATIVE
    boxes, label, image_index, box_lines = (column[has_box] for column in (boxes, label, image_index, lines))

    def where(row: int) -> str:
        return f"{path}:{box_lines[row]}"

    kept = check_boxes(report, boxes, label, image_index, where, "inverted box")
    _check_corners(path, boxes, report)
    rows = np.column_stack([boxes, label])[kept]
    return CsvBoxes(list(positions), image_lines, rows, image_index[kept], box_lines[kept])


def _columns(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], np.ndarray, Sequence[str]]:
    """Names, boxes [n, 4] and classes of rows that are as they should be.

    Raises:
        ValueError: one of them is not.
    """
    names, *numbers, classes = zip(*rows, strict=True)
    if len(numbers) != 4 or any("_" in "".join(column) for column in numbers):  # float() takes 1_0 for 10
        raise ValueError
    boxes = np.stack([np.fromiter(map(float, column), np.float64, len(rows)) for column in numbers], axis=1)
    return names, boxes, classes


def _look_closer(
    path: Path, numbers: Sequence[int], rows: Sequence[list[str]], report: Report
) -> tuple[list[int], list[list[str]]]:
    """The good ones among rows, and their lines; negatives have `nan` in place of their numbers."""
    good_numbers, good_rows = [], []
    for number, row in zip(numbers, rows, strict=True):
        where = f"{path}:{number}"
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if len(row) != 6:
            message = f"expected `path,x1,y1,x2,y2,class_name`, found {len(row)} columns"
            report.add("wrong column count", where, message)
        elif not any(field.strip() for field in row[1:]):
            good_numbers.append(number)
            good_rows.append([row[0], "nan", "nan", "nan", "nan", NO_CLASS])
        elif bad := [field for field in row[1:5] if not _is_number(field)]:
            if len(bad) == 4 and numbers[0] == 1 and not good_rows and _is_header(row):
                _check_header(where, row, report)
                continue
            hint = "; the decimal sign is a point" if any(_is_number(field.replace(",", ".")) for field in bad) else ""
            report.add("not a number", where, f"x1, y1, x2, y2 must be numbers, not {shown(bad[0])}{hint}")
        else:
            good_numbers.append(number)
            good_rows.append(row)
    return good_numbers, good_rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _is_header(row: Sequence[str]) -> bool:
    return all(field.strip()[:1].isalpha() for field in row[1:5])


def _check_header(where: str, row: Sequence[str], report: Report) -> None:
    """A first row of column names is left out, unless it says that the columns are not ours."""
    initials = "".join(field.strip().lower()[0] for field in row[1:5])
    names = ",".join(row[1:5])
    has_width = any(re.search(r"(^|[^a-z])w(idth)?$", field.strip().lower()) for field in row[1:5])
    if not has_width and (initials == "xyxy" or not set(initials) <= set("xywh")):
        report.add("header row", where, f"{shown(names)} are column names: line skipped")
    elif has_width or set(initials) == set("xywh"):
        report.add("looks like x, y, width, height", where, f"the columns are {shown(names)}; wanted are x1,y1,x2,y2")
    else:
        report.add("looks swapped", where, f"the columns are {shown(names)}; wanted are x1,y1,x2,y2")


def _check_spelling(path: Path, numbers: Sequence[int], column: Sequence[str], name: str, report: Report) -> None:
    """A path or a class that is met for the first time: too long, or with spaces around it?"""
    if name != name.strip() or len(name) > MAX_NAME:
        where = f"{path}:{numbers[column.index(name)]}"
        if len(name) > MAX_NAME:
            report.add("bad name", where, f"{shown(name)} has {len(name):,} characters, more than {MAX_NAME:,}")
        else:
            report.add("spaces", where, f"the spaces around {shown(name)} are not taken as its part")


def _check_corners(path: Path, boxes: np.ndarray, report: Report) -> None:
    """Whether so many boxes are inverted that they must be x, y, width, height."""
    inverted = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    count = int(inverted.sum())
    if count > max(1, len(boxes) / 20) and (boxes[inverted] >= 0).all() and (boxes[inverted, 2:] > 0).all():
        message = f"{count:,} of {len(boxes):,} boxes have x2 <= x1 or y2 <= y1; wanted are the corners x1,y1,x2,y2"
        report.add("looks like x, y, width, height", str(path), message)


def read_classes(path: Path, report: Report) -> list[str]:
    """Class names in the order of their ids, from `class_name,id` lines.

    Raises:
        UserError: the file is missing, empty, or no CSV file in UTF-8.
        DataError: what it says is wrong; without a list of classes there is no use in reading on.
    """
    text = _read_text(path, report)
    names: dict[int, str] = {}
    taken: set[str] = set()
    for numbers, rows in _chunks(path, text, _separator(path, text, 2, report)):
        for number, fields in zip(numbers, rows, strict=True):
            row, where = [field.strip() for field in fields], f"{path}:{number}"
            if not any(row):
                continue
            if len(row) != 2:
                report.add("class list", where, f"expected `class_name,id`, found {len(row)} columns")
            elif not (row[1].isascii() and row[1].isdecimal() and len(row[1]) < 10):
                if not names and not report.errors() and row[1].lower() in ("id", "class_id", "label", "index"):
                    report.add("header row", where, f"{shown(','.join(row))} are column names: line skipped")
                    continue
                hint = " (are the two columns swapped?)" if row[0].isdecimal() else ""
                report.add("class list", where, f"the class id must be a whole number, not {shown(row[1])}{hint}")
            elif row[0] in taken or int(row[1]) in names or not row[0]:
                message = f"class {shown(row[0])} or its id {row[1]} stands there twice, or it has no name"
                report.add("class list", where, message)
            else:
                names[int(row[1])] = row[0]
                taken.add(row[0])
    ids = sorted(names)
    if not report.errors() and (not ids or ids != list(range(len(ids)))):
        report.add("class list", str(path), f"class ids must run from 0 without gaps, found {shown(ids)}")
    report.raise_errors()
    return [names[label] for label in ids]


def _read_text(path: Path, report: Report) -> str:
    """The text of a file, with its form noted."""
    text = read_text(path, report)
    if not text.strip():
        raise UserError(f"{path}: is empty")
    for kind, sign in (("CRLF", "\r\n"), ("quoted fields", '"')):
        if sign in text:
            report.add(kind, f"{path}:{text.count(chr(10), 0, text.index(sign)) + 1}", "the first one")
    return text


def _separator(path: Path, text: str, num_columns: int, report: Report) -> str:
    """A comma, unless another separator gives the first line the right number of columns."""
    first = next(line for line in io.StringIO(text, newline="") if line.strip())
    for separator in ",;\t":
        if first.count(separator) == num_columns - 1:
            if separator != ",":
                report.add("separator", f"{path}:1", f"columns are separated by {shown(separator)}, not a comma")
            return separator
    return ","


def _chunks(path: Path, text: str, separator: str) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """Rows some hundreds at a time, with their line numbers from 1."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    done = 0
    try:
        while rows := list(itertools.islice(reader, CHUNK_ROWS)):
            if reader.line_num - done != len(rows):
                _find_long_row(path, text, separator)
            yield range(done + 1, reader.line_num + 1), rows
            done = reader.line_num
    except csv.Error as error:
        message = f"the quotes do not match, or a field is too long ({error}), somewhere from line {done + 1} to here"
        raise UserError(f"{path}:{reader.line_num}: is not a CSV file: {message}") from error


def _find_long_row(path: Path, text: str, separator: str) -> None:
    """Name the row that runs over several lines."""
    reader, done = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 0
    for _ in reader:
        if reader.line_num != done + 1:
            message = f"a quoted field runs on to line {reader.line_num}: is its quote not closed?"
            raise UserError(f"{path}:{done + 1}: {message}")
        done = reader.line_num


class CSVDataset(DetectionDataset):
    """A data set in two CSV files, as keras-retinanet and the original read them.

    Args:
        train_file: one box a line, `path,x1,y1,x2,y2,class_name`; a picture without boxes has one line
            `path,,,,,`. Relative paths start at this file's folder, or else at the working directory.
        class_list: one class a line, `class_name,id`, ids from 0.
        transform: sample -> sample.

    Raises:
        UserError: a file is missing, or lines are wrong; the message lists them all, with file and line.
    """

    def __init__(self, train_file: str | Path, class_list: str | Path, transform: Callable[[dict], dict] | None = None):
        self.train_file = Path(train_file)
        report = Report()
        class_names = read_classes(Path(class_list), report)
        content = read_boxes(self.train_file, class_names, report)
        super().__init__(
            content.image_files,
            content.annotations,
            content.image_index,
            class_names,
            transform,
            annotation_ids=content.lines,
            report=report,
            source=self.train_file,
        )
        self.image_lines = content.image_lines
        self.folder = str(self.train_file.parent)

    def image_name(self, index: int) -> str:
        """The CSV file and the image's first line there."""
        return f"{self.train_file}:{self.image_lines[index]}"

    def annotation_name(self, row: int) -> str:
        """The CSV file and the box's line there."""
        return f"{self.train_file}:{self.annotation_ids[row]}"

    def find_image(self, index: int) -> str | None:
        """Where the picture is: beside the CSV file, or else as the path stands; None if in neither place."""
        name = str(self.image_files[index])
        for path in (os.path.join(self.folder, name), name):  # noqa: PTH118, pathlib takes several times as long
            if os.path.isfile(path):  # noqa: PTH113
                return path
        return None

    def image_path(self, index: int) -> str:
        """Where the picture is.

        Raises:
            UserError: it is nowhere; the message names the line that wants it.
        """
        path = self.find_image(index)
        if path is None:
            name = str(self.image_files[index])
            hint = "; is it a Windows path?" if "\\" in name or name[1:2] == ":" else ""
            raise UserError(
                f"{self.image_name(index)}: there is no picture {shown(name)} (relative paths start at {self.folder}, "
                f"or else at the working directory){hint}"
            )
        return path
