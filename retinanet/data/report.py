"""What can be wrong with annotations and pictures, what is done about each, and reports of it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retinanet.errors import UserError, shown, suggestion

MAX_EXAMPLES = 20  # of each kind of problem in a report
MIN_SIDE = 0.995  # pixels: a box of one pixel stays, though its numbers, or YOLO's fractions, were rounded
MAX_COORDINATE = 1e6  # pixels; float32 still tells sixteenths of a pixel apart there

# What is done about each kind of problem. FATAL: nothing is read until it is mended. The others are warnings,
# which `--strict` makes fatal, save NOTED: there nothing is changed or guessed.
FATAL, DROPPED, CLIPPED, WARNED, NOTED = "fatal", "dropped", "clipped", "warned", "noted"
POLICIES = {
    "wrong column count": FATAL,
    "not a number": FATAL,
    "not finite": FATAL,
    "inverted box": FATAL,
    "looks like x, y, width, height": FATAL,
    "looks like x1, y1, x2, y2": FATAL,
    "looks normalised": FATAL,
    "looks swapped": FATAL,
    "unknown class": FATAL,
    "class list": FATAL,
    "bad entry": FATAL,
    "unknown image": FATAL,
    "duplicate image id": FATAL,
    "bad name": FATAL,
    "missing image": FATAL,
    "unreadable image": FATAL,
    "no boxes": FATAL,
    "header row": DROPPED,
    "sub-pixel box": DROPPED,
    "duplicate box": DROPPED,
    "box outside": DROPPED,
    "box partly outside": CLIPPED,
    "spaces": WARNED,
    "separator": WARNED,
    "unused class": WARNED,
    "crowd-only image": WARNED,
    "annotation ids": WARNED,
    "same image": WARNED,
    "stray file": WARNED,
    "declared size": WARNED,
    "EXIF rotation": WARNED,
    "invalid EXIF orientation": WARNED,
    "byte order mark": NOTED,
    "CRLF": NOTED,
    "quoted fields": NOTED,
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: a key of POLICIES.
        where: file and line, or file and the id of an image or annotation.
        message: what is wrong, and what may help.
    """

    kind: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Report:
    """Problems, counted by kind, with the first MAX_EXAMPLES of each."""

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[Problem]] = {}

    def add(self, kind: str, where: str, message: str) -> None:
        """Add one problem."""
        self.add_rows(kind, [0], lambda _: where, lambda _: message)

    def add_rows(
        self, kind: str, rows: Sequence[int] | np.ndarray, where: Callable[[int], str], message: Callable[[int], str]
    ) -> None:
        """Add a problem of many rows; `where` and `message` are asked only for those that are kept as examples."""
        assert kind in POLICIES, kind
        if len(rows):
            self.counts[kind] = self.counts.get(kind, 0) + len(rows)
            examples = self.examples.setdefault(kind, [])
            for row in rows[: MAX_EXAMPLES - len(examples)]:
                examples.append(Problem(kind, where(row), message(row)))

    def merge(self, other: "Report") -> None:
        """Take over what another report holds."""
        for kind, examples in other.examples.items():
            kept = self.examples.setdefault(kind, [])
            kept += examples[: MAX_EXAMPLES - len(kept)]
            self.counts[kind] = self.counts.get(kind, 0) + other.counts[kind]

    def kinds(self, *policies: str) -> list[str]:
        """The kinds that were found, of these policies."""
        return [kind for kind in POLICIES if kind in self.counts and POLICIES[kind] in policies]

    def errors(self, strict: bool = False) -> list[str]:
        """The kinds that were found and are fatal; `strict` makes all fatal that are not merely noted."""
        return self.kinds(FATAL, DROPPED, CLIPPED, WARNED) if strict else self.kinds(FATAL)

    def warnings(self, strict: bool = False) -> list[str]:
        """The other kinds that were found."""
        return [kind for kind in self.kinds(*set(POLICIES.values())) if kind not in self.errors(strict)]

    def text(self, kinds: Iterable[str], max_examples: int = MAX_EXAMPLES) -> str:
        """These kinds, each with its count, what is done about it, and examples; one problem alone as one line."""
        kinds = list(kinds)
        if sum(self.counts[kind] for kind in kinds) == 1:
            return str(self.examples[kinds[0]][0])
        lines = []
        for kind in kinds:
            examples = self.examples[kind][:max_examples]
            lines.append(f"{kind} ({POLICIES[kind]}): {self.counts[kind]:,}")
            lines += [f"  {problem}" for problem in examples]
            if self.counts[kind] > len(examples):
                lines.append(f"  ... and {self.counts[kind] - len(examples):,} more")
        return "\n".join(lines)

    def raise_errors(self, strict: bool = False) -> None:
        """Stop where anything is fatal.

        Raises:
            DataError: its message lists all that is fatal.
        """
        if self.errors(strict):
            raise DataError(self, strict)


class DataError(UserError):
    """Annotations or pictures that cannot be used as they are; `report` holds everything that was found."""

    def __init__(self, report: Report, strict: bool = False):
        super().__init__(report.text(report.errors(strict)))
        self.report = report


def unknown_class(name: str, known: Sequence[str]) -> str:
    """The message about a class that is not in the list."""
    listed = ", ".join(known[:20]) + (f", and {len(known) - 20} more" if len(known) > 20 else "")
    return f"class {shown(name.strip())} is not in the class list ({listed}){suggestion(name, known)}"


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
