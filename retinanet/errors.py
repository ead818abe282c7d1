"""UserError, for mistakes that users can fix, and functions that format its messages."""

import difflib
import itertools
import re
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

# Control characters, line breaks, halves of surrogate pairs, and characters that are invisible or change the direction
# of the text.
UNSAFE = re.compile(
    r"[\0-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


class UserError(ValueError):
    """A mistake that the user can fix: the message says where and how; the scripts print it and exit with status 1."""


def shown(value: object) -> str:
    """Quote a value for a message, with control characters escaped, cut to at most 300 characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def escaped(text: str) -> str:
    """A name or path that is safe to print on one line of a terminal: UNSAFE characters are escaped as in Python."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(name: str) -> str:
    """A name for a column of a table: `escaped`, and cut to at most 40 characters."""
    text = escaped(name)
    return text if len(text) <= 40 else text[:39] + "\N{HORIZONTAL ELLIPSIS}"


def listed(items: Sequence[str], most: int) -> str:
    """The first items of a list, at most so many, for a message: `a, b and 3 more`."""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def printable(text: str) -> str:
    """A message that is safe to print in a terminal: each line is `escaped`."""
    return "\n".join(map(escaped, text.split("\n")))


def output_file(path: str | Path) -> Path:
    """The path of a file to write; a UserError if it is a folder, a FIFO or a link, which may lead anywhere."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: exists and is not a regular file; remove it or choose another folder")
    return path


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message that suggests the most similar known word; empty if none is similar."""
    folded = {name.lower(): name for name in itertools.islice(known, 1000)}
    near = difflib.get_close_matches(word.strip().lower()[:100], folded, n=1)
    return f"; did you mean {shown(folded[near[0]])}?" if near else ""
