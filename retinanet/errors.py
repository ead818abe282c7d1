"""Errors that users can fix, and what their messages are made of."""

import difflib
import itertools
import reprlib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can fix: the scripts print its message, which says where and how, and exit with 1."""


def shown(value: object) -> str:
    """Quote a value for a message, with control characters escaped, cut to at most 300 characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 120
    short.maxlevel = 2
    text = short.repr(value)
    return text if len(text) <= 300 else text[:297] + "..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a message: the known word that a misspelt one probably meant; empty if none is similar."""
    folded = {name.lower(): name for name in itertools.islice(known, 1000)}
    near = difflib.get_close_matches(word.strip().lower()[:100], folded, n=1)
    return f"; did you mean {shown(folded[near[0]])}?" if near else ""
