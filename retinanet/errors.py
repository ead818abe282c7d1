"""Errors that users can fix, and the pieces that their messages are made of."""

import difflib
import itertools
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print its message, which says where and how, and exit with 1."""


def shown(value: object) -> str:
    """A value from a file for a message: quoted, with control characters escaped, cut to a bearable length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """The known word that a misspelt one may have meant, as the end of a message; empty where none is near."""
    folded = {name.lower(): name for name in itertools.islice(known, 1000)}
    near = difflib.get_close_matches(word.strip().lower()[:100], folded, n=1)
    return f"; did you mean {shown(folded[near[0]])}?" if near else ""
