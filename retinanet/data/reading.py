"""What the formats' readers share: text and JSON files, class lists, and checks of boxes."""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.report import MIN_SIDE, Report
from retinanet.errors import UserError, shown, suggestion

MAX_JSON_BYTES = 8 * 2**30  # parsed, a file takes five times its size of memory
MAX_NAME = 1024  # characters of an image's path
MAX_COORDINATE = 1e6  # pixels; float32 still tells sixteenths of a pixel apart there


def read_text(path: Path, report: Report) -> str:
    """The text of a file in UTF-8, without its byte order mark, which is noted.

    Raises:
        UserError: it is missing, or no such text; the message names the line.
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"{path}:{line}: is not in UTF-8 (byte {data[error.start]:#04x}, {error.reason}); save it as UTF-8"
        raise UserError(message) from error
    if "\0" in text:
        raise UserError(f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a zero byte, so it is no text")
    if data.startswith(b"\xef\xbb\xbf"):
        report.add("byte order mark", f"{path}:1", "the file begins with one")
    return text


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Inside, Python does not look for garbage among millions of new objects, which takes longer than they do."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@no_garbage_collection()
def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing, too large, too deep, or not JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, more than the limit of {MAX_JSON_BYTES:,}")
        if not size:
            raise UserError(f"{path}: is empty")
        return json.loads(path.read_bytes())
    except UserError:
        raise
    except json.JSONDecodeError as error:
        hint = "; does the file hold two documents?" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error}){hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        reason = error or type(error).__name__
        raise UserError(f"{path}: is not valid JSON, or too deep or too large to be read ({reason})") from error


def read_class_list(root: Path, report: Report) -> list[str] | None:
    """The class names of `root`/classes.txt, one a line; None where there is no such file."""
    path = root / "classes.txt"
    if not path.is_file():
        return None
    names = [line.strip() for line in read_text(path, report).splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: needs one class name a line, each once")
    return names


def unknown_class(name: str, known: Sequence[str]) -> str:
    """The message about a class that is not in the list."""
    listed = ", ".join(known[:20]) + (f", and {len(known) - 20} more" if len(known) > 20 else "")
    return f"class {shown(name.strip())} is not in the class list ({listed}){suggestion(name, known)}"


def check_boxes(
    report: Report,
    boxes: np.ndarray,
    labels: np.ndarray,
    image_index: np.ndarray,
    where: Callable[[int], str],
    zero_area: str,
    show: Callable[[int], str] | None = None,
) -> np.ndarray:
    """Report what is wrong with boxes in themselves, whatever the size of their pictures.

    Args:
        report: gets the problems.
        boxes: [N, 4] float64 xyxy, pixels.
        labels: [N] int.
        image_index: [N] int: the image of each box.
        where: file and line of a row, or the like.
        zero_area: the kind of problem that a box of no width or height is: "inverted box" or "sub-pixel box".
        show: the four numbers of a row, as they stand in the file; default: those of `boxes`.

    Returns:
        [N] bool: the boxes that stay, where nothing is fatal.
    """
    show = show or (lambda row: ",".join(f"{number:.10g}" for number in boxes[row]))
    finite = (np.abs(boxes) <= MAX_COORDINATE).all(axis=1)  # NaN: false
    with np.errstate(invalid="ignore", over="ignore"):
        side = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf)  # the shorter one
    inverted = finite & ((side <= 0) if zero_area == "inverted box" else (side < 0))
    small = finite & ~inverted & (side < MIN_SIDE)
    valid = finite & ~inverted
    report.add_rows(
        "not finite",
        np.flatnonzero(~finite),
        where,
        lambda row: f"a box needs finite numbers of at most {MAX_COORDINATE:,.0f}, found {show(row)}",
    )
    report.add_rows(
        "inverted box",
        np.flatnonzero(inverted),
        where,
        lambda row: f"a box needs x1 < x2 and y1 < y2, or a width and height above 0, found {show(row)}",
    )
    tiny = valid & (np.abs(boxes) <= 1).all(axis=1)
    if tiny.any() and (tiny.sum() == valid.sum() or (tiny.sum() > valid.sum() / 2 and (boxes[tiny] % 1).any())):
        first = int(np.flatnonzero(tiny)[0])
        report.add(
            "looks normalised",
            where(first),
            f"{tiny.sum():,} of {len(boxes):,} boxes, such as {show(first)}, lie from 0 to 1; boxes are wanted in "
            "pixels: multiply by the picture's width and height",
        )
    else:
        report.add_rows(
            "sub-pixel box", np.flatnonzero(small), where, lambda row: f"is less than 1 pixel wide or high: {show(row)}"
        )
    twin = _repeated([*boxes.T, labels, image_index]) & valid & ~small & (labels >= 0)
    report.add_rows(
        "duplicate box", np.flatnonzero(twin), where, lambda row: f"the same box {show(row)} stands there before"
    )
    return valid & ~small & ~twin


def _repeated(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Whether each row stood there before: [N] bool."""
    with np.errstate(all="ignore"):
        key = sum(column * np.sqrt(prime) for column, prime in zip(columns, (2, 3, 5, 7, 11, 13), strict=True))
    order = np.argsort(key, kind="stable")
    alike = np.flatnonzero(key[order[1:]] == key[order[:-1]])
    suspects = np.unique(order[np.concatenate([alike, alike + 1])])  # sorting these alone by all columns is quick
    order = suspects[np.lexsort([column[suspects] for column in columns])]  # stable: the first of the file comes first
    repeated = np.zeros(len(key), dtype=bool)
    repeated[order[1:]] = np.all([column[order[1:]] == column[order[:-1]] for column in columns], axis=0)
    return repeated
