"""What the readers of all formats share: text and JSON files, and checks of boxes."""

import contextlib
import gc
import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.report import MIN_SIDE, FileError, Report
from retinanet.errors import UserError
from retinanet.process import progress

MAX_BYTES = 2**33  # of an annotation file
MAX_NAME = 1024  # characters of an image's path
MAX_COORDINATE = 1e6  # pixels; up to here float32 is exact to a sixteenth of a pixel

EMPTY = {"", "nan", "none", "null", "na", "n/a", "<na>"}  # what tools write for a missing number
SIDE = re.compile(r"([0-9]{1,6})(\.0*)?")


def parse_side(text: str) -> int:
    """The height or width of an image, which some tools write as 128.0; 0 if the text is empty, -1 if it is invalid."""
    text = text.strip().lower()
    if text in EMPTY:
        return 0
    found = SIDE.fullmatch(text)
    return int(found[1]) if found else -1


def parse_number(text: str) -> float:
    """`float(text)`, but with a ValueError for digits with separators, because float() takes 5_0 for 50."""
    if "_" in text:
        raise ValueError(f"could not convert string to float: {text!r}")
    return float(text)


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file of at most MAX_BYTES; a FileError for others, such as a pipe that may never end."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise OSError("it is not a file")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise FileError(str(path), f"cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if len(content) > MAX_BYTES:
        raise FileError(str(path), f"has more than {MAX_BYTES:,} bytes")
    return content


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; a FileError for other encodings."""
    data = read_bytes(path)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileError(str(path), "is in UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"is not in UTF-8 (byte {data[error.start]:#04x}, {error.reason}); save it as UTF-8"
        raise FileError(f"{path}:{line}", message) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise FileError(f"{path}:{line}", "holds a zero byte, so it is not a text file")
    return text


def read_annotations(
    pairs: Mapping[Path, Path | None], read: Callable[[Path, Path | None], tuple[tuple[int, int], list]], report: Report
) -> dict[str, Any]:
    """Read the annotation file of each image into arguments of `DetectionDataset`.

    `read` takes an image and its file. It returns the image's height and width, and for each box (number in the file,
    difficult, x1, y1, x2, y2, label). If it raises a FileError, the image is reported and left out.
    """
    images, files, sizes, rows = [], [], [], []
    for image, file in progress(pairs.items(), "reading annotations", len(pairs)):
        try:
            size, boxes = read(image, file)
        except FileError as error:
            kind = "unreadable image" if error.where == str(image) else "bad entry"
            report.add(kind, error.where, error.message)
            continue
        rows += [(len(images), *box) for box in boxes]
        images.append(str(image))
        files.append(file)
        sizes.append(size)
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    image_index, annotation_ids, difficult = table[:, :3].T.astype(np.int64)
    return {
        "image_files": images,
        "annotations": table[:, 3:],
        "image_index": image_index,
        "difficult": difficult,
        "annotation_ids": annotation_ids,
        "declared_sizes": np.array(sizes, dtype=np.int64).reshape(-1, 2),
        "annotation_files": files,
        "report": report,
    }


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Within the context, Python collects no garbage, which among millions of new objects takes most of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@no_garbage_collection()
def load_json(path: Path) -> Any:
    """The content of a JSON file; a UserError if it is missing, too large, too deep, or not JSON."""
    try:
        return json.loads(read_bytes(path))  # which frees the bytes before it parses their text
    except FileError:
        raise
    except json.JSONDecodeError as error:
        hint = "; does the file hold two documents?" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error}){hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        reason = error or type(error).__name__
        raise UserError(f"{path}: is not valid JSON, or is too deep or too large to be read ({reason})") from error


def check_boxes(
    report: Report,
    annotations: np.ndarray,
    groups: np.ndarray,
    where: Callable[[int], str],
    written: np.ndarray | None = None,
) -> np.ndarray:
    """Report what is wrong with boxes by themselves, without the sizes of their images.

    Args:
        report: collects the problems.
        annotations: [N, 5] float64 (x1, y1, x2, y2, label); label -1 is an unknown class, which is reported elsewhere.
        groups: [N]; boxes of different groups, such as images, are no duplicates.
        where: the file and place of a row, for messages.
        written: [N, 4] the boxes as their file has them, for messages; default: as in `annotations`.

    Returns:
        [N] bool: the boxes to keep if nothing is fatal.
    """
    boxes, labels = annotations[:, :4], annotations[:, 4]

    def show(row: int) -> str:
        return ",".join(f"{number:.10g}" for number in (boxes if written is None else written)[row])

    finite = (np.abs(boxes) <= MAX_COORDINATE).all(axis=1)  # False for NaN
    with np.errstate(invalid="ignore", over="ignore"):
        shorter = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf)  # the shorter side
    valid = finite & (shorter >= 0)
    small = valid & (shorter < MIN_SIDE)
    good = valid & ~small & (labels >= 0)
    twin = np.zeros_like(good)
    twin[good] = _repeated([*boxes[good].T, labels[good], groups[good]])
    tiny = valid & (np.abs(boxes) <= 1.05).all(axis=1)
    all_tiny = tiny.any() and tiny.sum() == valid.sum()
    if all_tiny or (tiny.sum() > valid.sum() / 2 and (boxes[tiny] % 1).any()):
        first = int(tiny.argmax())
        message = (
            f"{tiny.sum():,} of {len(boxes):,} boxes, such as {show(first)}, lie between 0 and 1, but must be in "
            "pixels: multiply them by the image's width and height"
        )
        report.add("looks normalised" if all_tiny else "guess", where(first), message)
    for kind, rows, message in (
        ("not finite", ~finite, f"a box needs finite numbers of at most {MAX_COORDINATE:,.0f}, found"),
        ("inverted box", finite & ~valid, "a box needs x1 < x2 and y1 < y2, or a width and height above 0, found"),
        ("sub-pixel box", small & ~all_tiny, "is less than 1 pixel wide or high:"),
        ("duplicate box", twin, "repeats a box of the same image and class:"),
    ):
        report.add_rows(kind, rows, where, lambda row, message=message: f"{message} {show(row)}")
    return good & ~twin


def _repeated(columns: Sequence[np.ndarray]) -> np.ndarray:
    """[N] bool: whether each row equals an earlier one; the last column is the group."""
    x1, image = columns[0], columns[-1]
    # Sorting by two columns finds candidates several times as fast as NumPy finds unique rows among all.
    order = np.lexsort([x1, image])
    alike = (x1[order[1:]] == x1[order[:-1]]) & (image[order[1:]] == image[order[:-1]])
    candidates = np.union1d(order[1:][alike], order[:-1][alike])
    rows = np.column_stack([column[candidates] for column in columns])
    repeated = np.zeros(len(x1), dtype=bool)
    repeated[candidates] = True
    repeated[candidates[np.unique(rows, axis=0, return_index=True)[1]]] = False  # the first of each is none
    return repeated
