"""The two CSV files of keras-retinanet and the original: a data set, and its reader.

Rows are converted some hundreds at a time, column by column; they are looked at one by one only where that fails.
"""

import csv
import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.reading import MAX_NAME, check_boxes, read_text, unknown_class
from retinanet.data.report import Report
from retinanet.errors import UserError, shown

CHUNK_ROWS = 500  # few enough that the texts of a chunk stay in the processor's cache
UNKNOWN, NEGATIVE = -1, -2  # in place of a label: a class that is not in the list; a line without a box
NO_CLASS = "\0"  # in place of the class of a negative; no text that is read holds it


class CSVDataset(DetectionDataset):
    """A data set in two CSV files, as keras-retinanet and the original read them.

    Args:
        train_file: one box a line, `path,x1,y1,x2,y2,class_name`; an image without boxes has one line
            `path,,,,,`. Relative paths start at this file's folder, or else at the working directory.
        class_list: one class a line, `class_name,id`, ids from 0.
        transform: sample -> sample.
        report: gets what is wrong; its arguments say what is then done.

    Raises:
        UserError: a file is missing, or lines are wrong; the message lists them all, with file and line.
    """

    def __init__(
        self,
        train_file: str | Path,
        class_list: str | Path,
        transform: Callable[[dict], dict] | None = None,
        report: Report | None = None,
    ):
        self.train_file = Path(train_file)
        self.folder = str(self.train_file.parent)
        report = Report() if report is None else report
        class_names = read_classes(Path(class_list), report)
        image_files, self.image_lines, *columns = read_boxes(self.train_file, class_names, report)
        annotations, image_index, lines = columns
        super().__init__(
            image_files,
            annotations,
            image_index,
            class_names,
            transform,
            annotation_ids=lines,
            report=report,
            source=self.train_file,
        )

    def image_name(self, index: int) -> str:
        """The CSV file and the image's first line there."""
        return f"{self.train_file}:{self.image_lines[index]}"

    def annotation_name(self, row: int) -> str:
        """The CSV file and the box's line there."""
        return f"{self.train_file}:{self.annotation_ids[row]}"

    def find_image(self, index: int) -> str | None:
        """The image's file: relative to the CSV file, or else the path as it is; None where neither exists."""
        name = str(self.image_files[index])
        for path in (os.path.join(self.folder, name), name):  # noqa: PTH118, pathlib takes several times as long
            if os.path.isfile(path):  # noqa: PTH113
                return path
        return None

    def explain_missing(self, index: int) -> str:
        """Why `find_image` finds nothing."""
        name = str(self.image_files[index])
        hint = "; is it a Windows path?" if "\\" in name or name[1:2] == ":" else ""
        start = f"relative paths start at {self.folder}, or else at the working directory"
        return f"image {shown(name)} does not exist ({start}){hint}"

    def image_path(self, index: int) -> str:
        """The image's file.

        Raises:
            UserError: it does not exist; the message names the line that lists it.
        """
        path = self.find_image(index)
        if path is None:
            raise UserError(f"{self.image_name(index)}: {self.explain_missing(index)}")
        return path


def read_boxes(
    path: Path, class_names: Sequence[str], report: Report
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Read `path,x1,y1,x2,y2,class_name` lines; an image without boxes has one line `path,,,,,`.

    Args:
        path: the file.
        class_names: name of each label.
        report: gets what is wrong; where it holds no errors, the annotations are good.

    Returns:
        The images' paths, in the order of their first lines, and these lines [I], from 1; annotations [N, 5] float64
        (x1, y1, x2, y2, label), the image of each [N], and its line [N].

    Raises:
        UserError: the file is missing, empty, or not a CSV file in UTF-8.
    """
    labels = {name: label for label, name in enumerate(class_names)}
    label_of = {NO_CLASS: NEGATIVE}  # of each class as it is written
    positions: dict[str, int] = {}  # of each image
    position_of: dict[str, int] = {}  # the same, of each path as it is written
    parts = [(np.zeros((0, 4)), *[np.zeros(0, dtype=np.int64)] * 3)]
    for numbers, rows in _chunks(path, 6, report):
        try:
            names, boxes, classes = _columns(rows)
        except ValueError:
            numbers, rows = _look_closer(path, numbers, rows, report)
            if not rows:
                continue
            names, boxes, classes = _columns(rows)

        def where(row: int, numbers: Sequence[int] = numbers) -> str:
            return f"{path}:{numbers[row]}"

        image_index = _encode(
            names, position_of, lambda name: positions.setdefault(name, len(positions)), where, report
        )
        label = _encode(classes, label_of, lambda name: labels.get(name, UNKNOWN), where, report)
        unknown = np.flatnonzero(label == UNKNOWN)
        report.add_rows(
            "unknown class", unknown, where, lambda row, classes=classes: unknown_class(classes[row], class_names)
        )
        parts.append((boxes, label, image_index, np.asarray(numbers)))
    if not positions and not report.errors():
        raise UserError(f"{path}: lists no images")
    boxes, label, image_index, lines = map(np.concatenate, zip(*parts, strict=True))
    image_lines = lines[np.unique(image_index, return_index=True)[1]]
    if "" in positions:
        report.add("bad name", f"{path}:{image_lines[positions['']]}", "the image's path is empty")
    has_box = label != NEGATIVE
    boxes, label, image_index, lines = (column[has_box] for column in (boxes, label, image_index, lines))
    kept = check_boxes(report, boxes, label, image_index, lambda row: f"{path}:{lines[row]}")
    _check_corners(path, boxes, report)
    return list(positions), image_lines, np.column_stack([boxes, label])[kept], image_index[kept], lines[kept]


def _encode(
    texts: Sequence[str],
    codes: dict[str, int],
    new_code: Callable[[str], int],
    where: Callable[[int], str],
    report: Report,
) -> np.ndarray:
    """The codes [n] of texts; new ones get theirs, without the spaces around them, from `new_code`."""
    for text in dict.fromkeys(texts):
        if text in codes:
            continue
        codes[text] = new_code(text.strip())
        if len(text) > MAX_NAME:
            message = f"{shown(text)} has {len(text):,} characters, more than {MAX_NAME:,}"
            report.add("bad name", where(texts.index(text)), message)
        elif text != text.strip():
            report.add("spaces", where(texts.index(text)), f"the spaces around {shown(text)} are ignored")
    return np.fromiter(map(codes.__getitem__, texts), np.int64, len(texts))


def _columns(rows: Sequence[Sequence[str]]) -> tuple[Sequence[str], np.ndarray, Sequence[str]]:
    """Names, boxes [n, 4] and classes of rows.

    Raises:
        ValueError: one of the rows is malformed.
    """
    names, *numbers, classes = zip(*rows, strict=True)
    if len(numbers) != 4 or any("_" in "".join(column) for column in numbers):  # float() takes 1_0 for 10
        raise ValueError
    boxes = np.stack([np.fromiter(map(float, column), np.float64, len(rows)) for column in numbers], axis=1)
    return names, boxes, classes


def _look_closer(
    path: Path, numbers: Sequence[int], rows: Sequence[list[str]], report: Report
) -> tuple[list[int], list[list[str]]]:
    """The line numbers of good rows, and these; rows without a box have `nan` in place of its numbers."""
    good: dict[int, list[str]] = {}
    for number, row in zip(numbers, rows, strict=True):
        where = f"{path}:{number}"
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if len(row) != 6:
            message = f"expected `path,x1,y1,x2,y2,class_name`, found {len(row)} columns"
            report.add("wrong column count", where, message)
        elif not any(field.strip() for field in row[1:]):
            good[number] = [row[0], "nan", "nan", "nan", "nan", NO_CLASS]
        elif not (bad := [field for field in row[1:5] if not _is_number(field)]):
            good[number] = row
        elif numbers[0] == 1 and not good and all(field.strip()[:1].isalpha() for field in bad) and len(bad) == 4:
            _check_header(where, row, report)
        else:
            hint = "; the decimal sign is a point" if any(_is_number(field.replace(",", ".")) for field in bad) else ""
            report.add("not a number", where, f"x1, y1, x2, y2 must be numbers, not {shown(bad[0])}{hint}")
    return list(good), list(good.values())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _check_header(where: str, row: Sequence[str], report: Report) -> None:
    """Skip a first row of column names, unless they are those of other columns than ours."""
    names = [field.strip().lower() for field in row[1:5]]
    initials = "".join(name[0] for name in names)
    has_width = any(re.search(r"(^|[^a-z])w(idth)?$", name) for name in names)
    found = shown(",".join(row[1:5]))
    if not has_width and (initials == "xyxy" or not set(initials) <= set("xywh")):
        report.add("header row", where, f"{found} are column names: line skipped")
    else:
        kind = "looks like x, y, width, height" if has_width or set(initials) == set("xywh") else "looks swapped"
        report.add(kind, where, f"the columns are {found}, but must be x1,y1,x2,y2")


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
    for numbers, rows in _chunks(path, 2, report):
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
                message = f"class {shown(row[0])} or its id {row[1]} is repeated, or the class has no name"
                report.add("class list", where, message)
            else:
                names[int(row[1])] = row[0]
                taken.add(row[0])
    ids = sorted(names)
    if not report.errors() and (not ids or ids != list(range(len(ids)))):
        report.add("class list", str(path), f"class ids must run from 0 without gaps, found {shown(ids)}")
    report.raise_errors()
    return [names[label] for label in ids]


def _chunks(path: Path, num_columns: int, report: Report) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """The rows of a file, some hundreds at a time, with their line numbers from 1.

    Columns are separated by commas, unless another separator gives the first line the right number of columns.
    """
    text = read_text(path)
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), None)
    if first is None:
        raise UserError(f"{path}: is empty")
    separator = next((sign for sign in ",;\t" if first.count(sign) == num_columns - 1), ",")
    if separator != ",":
        report.add("separator", f"{path}:1", f"columns are separated by {shown(separator)}, not a comma")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    done = 0
    try:
        while rows := list(itertools.islice(reader, CHUNK_ROWS)):
            if reader.line_num - done != len(rows):
                reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
                line = next(number for number, _ in enumerate(reader, start=1) if reader.line_num != number)
                message = f"a quoted field continues on line {reader.line_num}: is its quote not closed?"
                raise UserError(f"{path}:{line}: {message}")
            yield range(done + 1, reader.line_num + 1), rows
            done = reader.line_num
    except csv.Error as error:
        message = f"the quotes do not match, or a field is too long ({error}), somewhere from line {done + 1} to here"
        raise UserError(f"{path}:{reader.line_num}: is not a CSV file: {message}") from error
