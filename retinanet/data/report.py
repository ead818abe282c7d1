"""What can be wrong with annotations and images, what is done about each, and reports of it."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from retinanet.errors import UserError

MAX_EXAMPLES = 20  # of each kind of problem in a report
MIN_SIDE = 0.995  # pixels: a box of one pixel stays, though its numbers, or YOLO's fractions, were rounded

# What is done about each kind of problem. FATAL: nothing is read until it is fixed. The others are warnings,
# which `--strict` makes fatal.
FATAL, DROPPED, CLIPPED, WARNED = "fatal", "dropped", "clipped", "warned"
KINDS = {
    FATAL: (
        *("wrong column count", "not a number", "not finite", "inverted box"),
        *("looks like x, y, width, height", "looks like x1, y1, x2, y2", "looks normalised", "looks swapped"),
        *("unknown class", "class list", "bad entry", "unknown image", "duplicate image id", "bad name"),
        *("missing image", "unreadable image", "no boxes"),
    ),
    DROPPED: ("header row", "sub-pixel box", "duplicate box", "box outside"),
    CLIPPED: ("box partly outside",),
    WARNED: (
        *("spaces", "separator", "unused class", "crowd-only image", "annotation ids", "same image", "stray file"),
        *("declared size", "declared area", "EXIF rotation", "invalid EXIF orientation"),
    ),
}
POLICIES = {kind: policy for policy, kinds in KINDS.items() for kind in kinds}


class Problem(NamedTuple):
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
        """Add a problem of many rows; `where` and `message` are called only for those that are kept as examples."""
        assert kind in POLICIES, kind
        if len(rows):
            self.counts[kind] = self.counts.get(kind, 0) + len(rows)
            examples = self.examples.setdefault(kind, [])
            examples += [Problem(kind, where(row), message(row)) for row in rows[: MAX_EXAMPLES - len(examples)]]

    def merge(self, other: "Report") -> None:
        """Add the problems of another report."""
        for kind, examples in other.examples.items():
            kept = self.examples.setdefault(kind, [])
            kept += examples[: MAX_EXAMPLES - len(kept)]
            self.counts[kind] = self.counts.get(kind, 0) + other.counts[kind]

    def kinds(self, *policies: str) -> list[str]:
        """The kinds that were found, of these policies."""
        return [kind for kind in POLICIES if kind in self.counts and POLICIES[kind] in policies]

    def errors(self, strict: bool = False) -> list[str]:
        """The kinds that were found and are fatal; `strict` makes all fatal."""
        return self.kinds(*KINDS) if strict else self.kinds(FATAL)

    def warnings(self, strict: bool = False) -> list[str]:
        """The other kinds that were found."""
        return [] if strict else self.kinds(DROPPED, CLIPPED, WARNED)

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
    """Annotations or images that cannot be used as they are; `report` holds everything that was found."""

    def __init__(self, report: Report, strict: bool = False):
        super().__init__(report.text(report.errors(strict)))
        self.report = report


class FileError(UserError):
    """A file that cannot be read; `where` names it, perhaps with a line, and `message` says why."""

    def __init__(self, where: str, message: str):
        super().__init__(where, message)
        self.where = where
        self.message = message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"
