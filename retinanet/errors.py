"""Errors that users can fix, and what their messages are made of."""

import difflib
import itertools
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path

# Control characters, line breaks, halves of surrogate pairs, and what is invisible or turns the direction of writing.
UNSAFE = re.compile(
    r"[\0-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


class UserError(ValueError):
    """A mistake that the user can fix: the scripts print its message, which says where and how, and exit with 1."""


def shown(value: object) -> str:
    """Quote a value for a message, with control characters escaped, cut to at most 300 characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def escaped(text: str) -> str:
    """A name or path as a line of a terminal may hold it: what is UNSAFE as Python escapes it."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(name: str, length: int = 40) -> str:
    """A name, `escaped`, for a column of a table."""
    text = escaped(name)
    return text if len(text) <= length else text[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"


def printable(text: str) -> str:
    """A message as a terminal may get it: each of its lines `escaped`."""
    return "\n".join(map(escaped, text.split("\n")))


def output_file(path: str | Path) -> Path:
    """A file that may be written; a UserError if a link, which may lead anywhere, a FIFO or a folder lies there."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise UserError(f"{path}: exists and is not a regular file; remove it, or choose another folder")
    return path


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message: the known word that a misspelt one probably meant; empty if none is similar."""
    folded = {name.lower(): name for name in itertools.islice(known, 1000)}
    near = difflib.get_close_matches(word.strip().lower()[:100], folded, n=1)
    return f"; did you mean {shown(folded[near[0]])}?" if near else ""
