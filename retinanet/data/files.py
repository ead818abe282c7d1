"""Finding image files in folders and by patterns, and explaining why one is missing or cannot be read."""

import contextlib
import functools
import glob
import itertools
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Container, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import numpy as np
from PIL import Image

from retinanet.data.report import FileError
from retinanet.data.video import VIDEO_SUFFIXES
from retinanet.errors import UserError, shown

IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
# What Pillow, torchvision and tifffile raise for broken files.
BROKEN_IMAGE = (
    OSError, RuntimeError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError, EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Within the context, any exception that a broken image raises becomes a FileError that names it."""
    try:
        yield
    except UserError:
        raise
    except BROKEN_IMAGE as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise FileError(str(path), f"cannot be read as an image ({reason})") from error


def evenly(items: Sequence, number: int) -> list:
    """At most `number` of the items, evenly spaced from the first to the last."""
    places = np.unique(np.linspace(0, len(items) - 1, min(number, len(items))).astype(int))
    return [items[place] for place in places]


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@functools.lru_cache(maxsize=16)
def _plain_names(folder: str) -> dict[str, str]:
    """The names in a folder, by the same names without differences of letter case and Unicode form."""
    with contextlib.suppress(OSError, ValueError):
        return {_plain(name): name for name in os.listdir(folder)}  # noqa: PTH208
    return {}


def missing_folder(path: str) -> str:
    """The topmost folder of a path that does not exist; empty if all exist."""
    missing = [*itertools.takewhile(lambda parent: not os.path.isdir(parent), Path(path).parents)]  # noqa: PTH112
    return str(missing[-1]) if missing else ""


def explain_missing(name: str, folder: str = "") -> str:
    """The message about an image that does not exist; it names a file with nearly the same name if there is one."""
    path, found = os.path.join(folder, name), folder  # noqa: PTH118
    for part in Path(name.replace("\\", "/")).parts:
        whole = os.path.join(found, part)  # noqa: PTH118
        near = part if os.path.exists(whole) else _plain_names(found or ".").get(_plain(part))  # noqa: PTH110
        if near is None:
            parent = missing_folder(path)
            lost = f", nor does its folder {shown(parent)}" if parent else ""
            windows = "; is it a Windows path?" if "\\" in name else ""
            return f"image {shown(name)} does not exist{lost}{windows}"
        found = os.path.join(found, near)  # noqa: PTH118
    same_text = found != path and unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", path)
    form = ", in another Unicode form (NFC or NFD)" if same_text else ""
    return f"image {shown(name)} does not exist, but {shown(found)} does{form}"


def walk(folder: Path, suffixes: Container[str]) -> Iterator[Path]:
    """The files in a folder and its subfolders, sorted, whose suffix in lower case is one of `suffixes`.

    Links are followed, once each. Names that start with a dot are left out.
    """
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)  # noqa: PTH116
        if (key := (status.st_dev, status.st_ino)) in seen:  # reached by a link before
            folders.clear()
            continue
        seen.add(key)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):  # noqa: PTH122, faster
                yield Path(parent, name)


def list_images(folder: Path, wanted: Container[str] | None = None, preferred: Container[str] = ()) -> dict[str, Path]:
    """The images in a folder and its subfolders, by their relative paths without suffix, sorted.

    If several images differ only in their suffix, the one whose file name is in `preferred` wins.

    Raises:
        UserError: the folder cannot be read, or images of a `wanted` name (default: any) differ only in their suffix.
    """
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a folder of images ({error.strerror})") from error
    found: dict[str, Path] = {}
    for path in walk(folder, IMAGE_SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        other = found.setdefault(name, path)
        is_preferred, was_preferred = path.name in preferred, other.name in preferred
        if is_preferred and not was_preferred:
            found[name] = path
        elif path != other and is_preferred == was_preferred and (wanted is None or name in wanted):
            raise UserError(f"{path}: differs from {other.name} only in its suffix; remove one of them")
    return dict(sorted(found.items(), key=itemgetter(1)))


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The files that `--images` names, each once: files, images and videos in folders, matches of patterns.

    Numbers in names are sorted as numbers: frame2 before frame10.

    Raises:
        UserError: a pattern matches no file.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            inside = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
            matches = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file()]  # noqa: PTH207
        if not matches:
            raise UserError(f"--images {pattern}: no such images exist")
        files |= dict.fromkeys(sorted(matches, key=_natural_order))
    return list(files)


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """A key that sorts numbers within names as numbers."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(path))]
