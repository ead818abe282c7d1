"""CSV text -> columns, under the names that many tools give them.

Rows are converted some hundreds at a time, column by column, and looked at one by one only if that fails.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from retinanet.data.reading import EMPTY, MAX_NAME, parse_number, parse_side, read_text
from retinanet.data.report import DataError, Report
from retinanet.errors import UserError, shown

CHUNK_ROWS = 500  # few enough that the texts of a chunk stay in the processor's cache
NO_CLASS = "\0"  # the class of an image without objects; `read_text` lets no file contain it
# The required columns, in order, with the names that tools give them in headers, the most specific name first.
COLUMNS = {
    "path": (
        *("path", "image_path", "img_path", "file_path", "filepath", "filename", "file_name", "file", "image_name"),
        *("image", "img", "image_id"),
    ),
    "x1": ("x1", "xmin", "x_min", "left", "bbox_x1", "xtl"),
    "y1": ("y1", "ymin", "y_min", "top", "bbox_y1", "ytl"),
    "x2": ("x2", "xmax", "x_max", "right", "bbox_x2", "xbr"),
    "y2": ("y2", "ymax", "y_max", "bottom", "bbox_y2", "ybr"),
    "class_name": ("class_name", "classname", "class", "category_name", "category", "label_name", "label", "name"),
}
SIZES = {"height": ("height", "image_height", "img_height"), "width": ("width", "image_width", "img_width")}


class Layout(NamedTuple):
    """Where the columns are in a row."""

    places: Sequence[int] = range(6)  # of COLUMNS
    sizes: Sequence[int] = ()  # places of SIZES
    number: int = 6  # of all columns
    header: list[str] | None = None
    note: str = ""  # the message about the header


class Table(NamedTuple):
    """The N well-formed rows of a file; texts are stripped, and stored as codes, indices into a list of them."""

    path: Path
    lines: np.ndarray  # [N] int, from 1
    paths: list[str]  # in the order of their first rows
    path_codes: np.ndarray  # [N] int
    boxes: np.ndarray  # [N, 4] float64
    has_box: np.ndarray  # [N] bool: False in the row of an image without objects
    classes: list[str]
    class_codes: np.ndarray  # [N] int
    sizes: np.ndarray  # [N, 2] int: height and width, of `parse_side`

    def class_names(self) -> list[str]:
        """The classes of the boxes, sorted."""
        return sorted({self.classes[code] for code in np.unique(self.class_codes[self.has_box])} - {""})

    def class_name(self, row: int) -> str:
        """The class of a row."""
        return self.classes[self.class_codes[row]]

    def where(self, row: int) -> str:
        """The file and line of a row, for messages."""
        return f"{self.path}:{self.lines[row]}"


def read_table(path: Path, report: Report) -> Table:
    """Read a CSV file of boxes; a UserError if it is missing, empty, not CSV in UTF-8, or lacks columns."""
    layout, paths, classes, parts = None, {}, {}, []
    for numbers, rows in read_rows(path, 6, report):
        layout = layout or _read_header(path, numbers, rows, report)
        try:
            columns = _to_columns(rows, layout, paths, classes)
        except ValueError:
            numbers, rows = _look_closer(path, numbers, rows, layout, report)
            columns = _to_columns(rows, layout, paths, classes)
        parts.append((*columns, np.asarray(numbers, dtype=np.int64)))
    path_codes, boxes, class_codes, sizes, lines = map(np.concatenate, zip(*parts, strict=True))
    if not len(lines) and not report.errors():
        raise UserError(f"{path}: lists no images")
    has_box = ~(np.isnan(boxes).all(axis=1) | (boxes == 0).all(axis=1) | (boxes == -1).all(axis=1))
    _check_texts(path, classes, class_codes[has_box], lines[has_box], report)
    _check_texts(path, paths, path_codes, lines, report)
    if not layout.header:
        _check_corners(path, boxes[has_box], report)
    names, class_names = ([text.strip() for text in texts] for texts in (paths, classes))
    table = Table(path, lines, names, path_codes, boxes, has_box, class_names, class_codes, sizes)
    named = class_codes != classes.get(NO_CLASS, -1)
    message = "is read as an image without objects; better write its line as `path,,,,,`"
    report.add_rows("no objects", ~has_box & named, table.where, message, "")
    message = "height or width is not a whole number of pixels, so those of the image file are used"
    report.add_rows("declared size", (sizes < 0).any(axis=1), table.where, message, "")
    return table


def read_rows(path: Path, num_columns: int, report: Report) -> Iterator[tuple[Sequence[int], list[list[str]]]]:
    """The rows of a file, some hundreds at a time, with their line numbers from 1.

    The separator is the one that gives the first line the right number of columns, or else the most lines.
    """
    text = read_text(path)
    some = list(itertools.islice(filter(str.strip, io.StringIO(text, newline="")), CHUNK_ROWS))
    if not some:
        raise UserError(f"{path}: is empty")
    fits = {sign: [line.count(sign) == num_columns - 1 for line in some] for sign in ",;\t"}
    separator = max(fits, key=lambda sign: (fits[sign][0], sum(fits[sign]), some[0].count(sign)))
    if separator != ",":
        report.add("separator", f"{path}:1", f"columns are separated by {shown(separator)}, not a comma")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    done = 0
    try:
        while rows := list(itertools.islice(reader, CHUNK_ROWS)):
            if reader.line_num - done != len(rows):
                line = next(line for line, row in enumerate(rows, start=done + 1) if {"\r", "\n"} & set("".join(row)))
                raise UserError(f"{path}:{line}: a quoted field continues on line {line + 1}; is a quote missing?")
            yield range(done + 1, reader.line_num + 1), rows
            done = reader.line_num
    except csv.Error as error:
        message = f"quotes do not match or a field is too long ({error}) between line {done + 1} and this one"
        raise UserError(f"{path}:{reader.line_num}: is not a valid CSV file: {message}") from error


def _read_header(path: Path, numbers: Sequence[int], rows: Sequence[list[str]], report: Report) -> Layout:
    """The columns that the first row names if it is a header, or else the usual ones."""
    row = next((row for row in rows if any(map(str.strip, row))), [])
    names = [re.sub(r"[\s-]+", "_", field.strip().lower()) for field in row]
    if any(map(_is_number, row)) or sum(map(bool, names)) < 2:
        return Layout()
    roles = COLUMNS | SIZES
    # If several columns fit one role, the one whose name comes first in COLUMNS or SIZES is used.
    places = {role: names.index(name) for role in roles for name in reversed(roles[role]) if name in names}
    lacking = [role for role in COLUMNS if role not in places]
    where, found = f"{path}:{numbers[rows.index(row)]}", shown(",".join(row))
    if lacking and any(re.search(r"(^|_)w(idth)?$", name) for name in names):
        report.add("looks like x, y, width, height", where, f"the columns are {found}, but must be x1,y1,x2,y2")
        raise DataError(report)
    if len(lacking) > 4:
        return Layout()
    if lacking:
        choices = "; ".join(f"{role} (such as {', '.join(COLUMNS[role][1:4])})" for role in lacking)
        raise UserError(f"{where}: the header {found} has no column for {choices}")
    ignored = ", ".join(field for place, field in enumerate(row) if place not in places.values() and field)
    sizes = [places[side] for side in SIZES] if SIZES.keys() <= places.keys() else []
    note = f"{found} are column names" + (f"; not read: {shown(ignored)}" if ignored else "")
    return Layout([places[role] for role in COLUMNS], sizes, len(row), row, note)


def _to_columns(
    rows: Sequence[list[str]], layout: Layout, path_codes: dict[str, int], class_codes: dict[str, int]
) -> tuple[np.ndarray, ...]:
    """The path codes [n], boxes [n, 4], class codes [n] and sizes [n, 2] of rows; a ValueError if a row is bad."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * layout.number
    if len(columns) != layout.number:
        raise ValueError
    paths, *numbers, classes = (columns[place] for place in layout.places)
    if any("_" in "".join(column) for column in numbers):  # float() takes 1_0 for 10
        raise ValueError
    boxes = np.stack([np.fromiter(map(float, column), np.float64, len(rows)) for column in numbers], axis=1)
    sizes = np.zeros((len(rows), 2), dtype=np.int64)
    for side, place in enumerate(layout.sizes):
        read = {text: parse_side(text) for text in set(columns[place])}
        sizes[:, side] = [read[text] for text in columns[place]]
    return _encode(paths, path_codes), boxes, _encode(classes, class_codes), sizes


def _encode(texts: Sequence[str], codes: dict[str, int]) -> np.ndarray:
    """The codes [n] of texts; new texts are added to `codes`."""
    for text in dict.fromkeys(texts):
        codes.setdefault(text, len(codes))
    return np.fromiter(map(codes.__getitem__, texts), np.int64, len(texts))


def _look_closer(
    path: Path, numbers: Sequence[int], rows: Sequence[list[str]], layout: Layout, report: Report
) -> tuple[list[int], list[list[str]]]:
    """The good rows and their line numbers; rows without a box get `nan` for its numbers. Bad rows are reported."""
    good: dict[int, list[str]] = {}
    *places, class_place = layout.places[1:]
    for number, row in zip(numbers, rows, strict=True):
        where = f"{path}:{number}"
        if not row or (len(row) == 1 and not row[0].strip()):
            continue
        if row == layout.header:
            report.add("header row", where, layout.note, layout.note)
        elif len(row) != layout.number:
            columns = f"{layout.number} columns" if layout.header else "`path,x1,y1,x2,y2,class_name`"
            report.add("wrong column count", where, f"expected {columns}, found {len(row)} columns", len(row))
        elif all(row[place].strip().lower() in EMPTY for place in places):
            good[number] = ["nan" if place in places else field for place, field in enumerate(row)]
            good[number][class_place] = row[class_place].strip() or NO_CLASS
        elif not (bad := [row[place] for place in places if not _is_number(row[place])]):
            good[number] = row
        else:
            hint = "; use a decimal point" if any(_is_number(field.replace(",", ".")) for field in bad) else ""
            report.add("not a number", where, f"x1, y1, x2, y2 must be numbers, not {shown(bad[0])}{hint}")
    return list(good), list(good.values())


def _is_number(text: str) -> bool:
    try:
        parse_number(text)
    except ValueError:
        return False
    return True


def _check_texts(path: Path, texts: Mapping[str, int], codes: np.ndarray, lines: np.ndarray, report: Report) -> None:
    """Report texts that are too long or have spaces around them, each at the first line of its code."""
    for text, row in zip(texts, first_rows(codes, len(texts)), strict=True):
        if row == len(codes):  # a class of images without objects
            continue
        where = f"{path}:{lines[row]}"
        if len(text) > MAX_NAME:
            report.add("bad name", where, f"{shown(text)} has {len(text):,} characters, more than {MAX_NAME:,}")
        elif text != text.strip():
            report.add("spaces", where, f"the spaces around {shown(text)} are ignored")


def first_rows(codes: np.ndarray, number: int) -> np.ndarray:
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
