"""What can be wrong with annotations and images, what is done about each problem, and reports of problems."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from retinanet.errors import UserError, escaped

MAX_EXAMPLES = 20  # of each kind of problem in a report
MIN_SIDE = 0.995  # pixels; a little less than 1, so that boxes of one pixel survive rounding

# What is done about each kind of problem. FATAL stops the program; with `--skip_bad`, kinds that are SKIPPABLE are
# SKIPPED instead. The others are warnings, which `--strict` makes fatal.
FATAL, SKIPPED, DROPPED, CLIPPED, WARNED = "fatal", "skipped", "dropped", "clipped", "warned"
SKIPPABLE = (
    *("wrong column count", "not a number", "not finite", "inverted box", "unknown class", "bad entry"),
    *("unknown image", "bad name", "missing image", "unreadable image", "boxes of another size"),
)
KINDS = {
    FATAL: (
        *SKIPPABLE,
        # Mistakes that nothing else explains; less certain ones are of the kind "guess".
        *("looks like x, y, width, height", "looks like x1, y1, x2, y2", "looks normalised", "looks swapped"),
        *("class list", "different classes", "duplicate image id", "no boxes"),
    ),
    DROPPED: ("header row", "sub-pixel box", "duplicate box", "box outside"),
    CLIPPED: ("box partly outside",),
    WARNED: (
        *("guess", "repeated image", "no validation boxes", "turned boxes", "scaled boxes", "declared size"),
        *("spaces", "separator", "unused class", "crowd-only image", "annotation ids", "stray file", "EXIF rotation"),
        *("declared area", "no annotations", "negative with boxes", "other source", "crowds", "no objects"),
    ),
}
POLICIES = {"leak": WARNED, **{kind: policy for policy, kinds in KINDS.items() for kind in kinds}}  # leaks come first


def counted(number: int, noun: str) -> str:
    """1 box, 2 boxes; 1 image, 1,000 images."""
    return f"{number:,} {noun if number == 1 else noun + ('es' if noun[-1] in 'sx' else 's')}"


Rows = Sequence | np.ndarray  # indices or other identifiers of rows, or a mask [N] bool
OfRow = Callable[[Any], str]


class Problem(NamedTuple):
    """One problem, or all problems with the same cause."""

    kind: str  # a key of POLICIES
    where: str  # file and line, or file and id of an image or annotation, of the first one
    message: str  # what is wrong, and what may help
    count: int = 1
    cause: Hashable = None

    def __str__(self) -> str:
        start = "a guess: " if self.kind == "guess" else ""
        times = f" ({self.count:,} times; this is the first)" if self.count > 1 else ""
        return f"{escaped(self.where)}: {start}{self.message}{times}"


class Report:
    """Problems, counted by kind, with the first MAX_EXAMPLES of each; those with one cause are one example.

    Args:
        tolerant: data sets raise no errors and use what is good, so that `check` can look at all of it.
        skip_bad: problems that are SKIPPABLE are not fatal, but left out and listed in `skipped` (place and message).
    """

    def __init__(self, tolerant: bool = False, skip_bad: bool = False):
        self.tolerant = tolerant
        self.skip_bad = skip_bad
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[Problem]] = {}
        self.skipped: list[tuple[str, str]] = []

    def policy(self, kind: str) -> str:
        """What is done about a kind of problem."""
        assert kind in POLICIES, kind
        return SKIPPED if self.skip_bad and kind in SKIPPABLE else POLICIES[kind]

    def add(self, kind: str, where: str, message: str, cause: Hashable = None, count: int = 1) -> None:
        """Add a problem; those of a kind with the same `cause` (a class name, a missing folder) are joined."""
        if self.policy(kind) == SKIPPED:
            self.skipped.append((where, message))
        self.counts[kind] += count
        self._add_example(Problem(kind, where, message, count, cause))

    def add_rows(self, kind: str, rows: Rows, where: OfRow, message: str | OfRow, cause: Any = None) -> None:
        """Add a problem of many rows; `message` and `cause` are the same for all, or functions of a row.

        To save time, `where` and `message` are called only for rows that are examples or listed as skipped, and
        `message` only once per cause.
        """
        if isinstance(rows, np.ndarray) and rows.dtype == bool:
            rows = np.flatnonzero(rows)
        skipping = self.policy(kind) == SKIPPED
        if not len(rows):
            return
        groups: dict[tuple, list] = {}  # by cause; rows without a cause are groups of their own
        for row in rows if cause is not None or skipping else rows[:MAX_EXAMPLES]:
            name = cause(row) if callable(cause) else cause
            groups.setdefault((name, name is None and len(groups)), []).append(row)
        for (name, _), group in islice(groups.items(), None if skipping else MAX_EXAMPLES):
            text = message(group[0]) if callable(message) else message
            self._add_example(Problem(kind, where(group[0]), text, len(group), name))
            if skipping:
                self.skipped += [(where(row), text) for row in group]
        self.counts[kind] += len(rows)

    def _add_example(self, problem: Problem) -> None:
        examples = self.examples.setdefault(problem.kind, [])
        for place, other in enumerate(examples if problem.cause is not None else ()):
            if other.cause == problem.cause:
                examples[place] = other._replace(count=other.count + problem.count)
                return
        if len(examples) < MAX_EXAMPLES:
            examples.append(problem)

    def merge(self, other: "Report") -> None:
        """Add the problems of another report."""
        for kind, examples in other.examples.items():
            for problem in examples:
                self._add_example(problem)
            self.counts[kind] += other.counts[kind]
        self.skipped += other.skipped

    def kinds(self, *policies: str) -> list[str]:
        """The kinds that were found and have one of these policies."""
        return [kind for kind in POLICIES if kind in self.counts and self.policy(kind) in policies]

    def errors(self, strict: bool = False) -> list[str]:
        """The kinds that were found and are fatal; with `strict`, all that are not skipped."""
        return self.kinds(*KINDS) if strict else self.kinds(FATAL)

    def warnings(self, strict: bool = False) -> list[str]:
        """The kinds that were found and are not fatal."""
        return self.kinds(SKIPPED) if strict else self.kinds(SKIPPED, DROPPED, CLIPPED, WARNED)

    def text(self, kinds: Iterable[str], max_examples: int = MAX_EXAMPLES) -> str:
        """List kinds, each with its policy, count and examples; a single problem is one line."""
        kinds = list(kinds)
        if sum(len(self.examples[kind]) for kind in kinds) == 1:
            return str(self.examples[kinds[0]][0])
        lines = []
        for kind in kinds:
            examples = self.examples[kind][:max_examples]
            lines.append(f"{kind} ({self.policy(kind)}): {self.counts[kind]:,}")
            lines += [f"  {problem}" for problem in examples]
            if (more := self.counts[kind] - sum(problem.count for problem in examples)) > 0:
                lines.append(f"  ... and {more:,} more")
        return "\n".join(lines)

    def raise_errors(self, strict: bool = False) -> None:
        """Raise a DataError that lists everything fatal, if anything is."""
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
        return f"{escaped(self.where)}: {self.message}"
