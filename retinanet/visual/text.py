"""Makes class names and file names drawable: in letters that a font has, on one line, not too long."""

import contextlib
import functools
import importlib.util
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from PIL import ImageFont

from retinanet.process import log

NAME_LIMIT = 24  # characters of a class name; the rest is cut
FONT_FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "$HOME/.local/share/fonts", "$HOME/.fonts",
    "/System/Library/Fonts", "/Library/Fonts", "$HOME/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
UNASSIGNED = "\uffff"  # never a character: a font draws it like every character that it lacks


def one_line(text: str, limit: int | None = None) -> str:
    """Text without line breaks, control and invisible characters; above `limit` characters, cut with an ellipsis."""
    visible = [letter for letter in unicodedata.normalize("NFC", text) if unicodedata.category(letter) != "Cf"]
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in visible).split())
    return line if limit is None or len(line) <= limit else line[: limit - 1].rstrip() + "…"


def drawable(text: str) -> str:
    """Text on one line, in letters that an installed font has: others become ASCII letters, or `?`."""
    line = one_line(text)
    return line if find_font(line) is not None else _to_ascii(line).encode("ascii", "replace").decode()


def _to_ascii(text: str) -> str:
    """Letters without their accents; other letters than Latin ones stay."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def readable_names(class_names: Iterable[str]) -> list[str]:
    """Class names that can be drawn, cut to NAME_LIMIT characters; if no font has the letters, ASCII or `class 3`."""
    names = []
    for label, name in enumerate(class_names):
        line = one_line(name, NAME_LIMIT)
        if find_font(line) is None:
            line = _to_ascii(line)
        names.append(line if line and find_font(line) is not None else f"class {label}")
    return names


def load_font(text: str, size: float) -> ImageFont.FreeTypeFont:
    """A font of `size` pixels that has the letters of a text; Pillow's own if no installed font has them all."""
    return _load_font(find_font(text), size)


def find_font(text: str) -> str | None:
    """The file of a font that has all letters of a text; "" for Pillow's own font, None if no font has them."""
    return "" if text.isascii() else font_with(frozenset(text))


@functools.cache
def font_with(letters: frozenset[str]) -> str | None:
    """As `find_font`, for a set of letters."""
    for path in ["", *installed_fonts()]:
        with contextlib.suppress(OSError):
            font = _load_font(path, 20)
            missing = bytes(font.getmask(UNASSIGNED))
            if all(letter.isspace() or bytes(font.getmask(letter)) != missing for letter in letters):
                return path
    _warn_of_fonts()
    return None


@functools.cache
def _warn_of_fonts() -> None:
    log.warning(
        "warning: no installed font has the letters of some names, so they are drawn in ASCII or as numbers; install "
        "one that has them, such as Noto Sans (on Debian: apt install fonts-noto-core fonts-noto-cjk)"
    )


@functools.cache
def installed_fonts() -> list[str]:
    """Font files, regular ones first; if matplotlib is installed, its own font comes before all others."""
    found = [path for folder in FONT_FOLDERS for path in Path(os.path.expandvars(folder)).rglob("*.[to]t[fc]")]
    styles = ("Bold", "Italic", "Oblique", "Mono", "Light")
    found.sort(key=lambda path: (any(style in path.name for style in styles), path.name))
    if matplotlib := importlib.util.find_spec("matplotlib"):
        found.insert(0, Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")
    return [str(path) for path in found]


@functools.cache
def _load_font(path: str | None, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size=size)
