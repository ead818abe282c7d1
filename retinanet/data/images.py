"""Image files -> arrays, whatever their kind, and whatever is wrong with them."""

import contextlib
import functools
import glob
import io
import os
import re
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from retinanet.data.report import FileError
from retinanet.data.video import VIDEO_SUFFIXES
from retinanet.errors import UserError, shown

# Pillow warns of large, palette and oddly tagged images, which are read, without their names; torchvision of its end.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")

# What decodes JPEG, bytes [N] uint8 -> [3, H, W] uint8, best first, where it is installed. Pillow gives the same
# pixels, more slowly.
JPEG_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {}
with contextlib.suppress(Exception):  # whatever its libraries of other versions raise
    from torchcodec.decoders import decode_image

    JPEG_DECODERS["torchcodec"] = functools.partial(decode_image, mode="RGB")
with contextlib.suppress(ImportError):  # torchvision 0.29 announces that it will go
    from torchvision.io import ImageReadMode, decode_jpeg

    JPEG_DECODERS["torchvision"] = functools.partial(decode_jpeg, mode=ImageReadMode.RGB)

# Formats that are read. Pillow knows more; some of them start other programs, or hold other files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
MAX_PIXELS = 178_956_970  # of an image; from here on Pillow, too, takes it for a decompression bomb
MAX_BYTES = 2**31  # of an image's file: more than MAX_PIXELS of 16 bits a channel
# What the readers of Pillow and torchvision raise for one broken file or another.
BROKEN_IMAGE = (
    OSError, RuntimeError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError,
    AssertionError, EOFError, MemoryError, struct.error, zlib.error,
)  # fmt: skip
# What turns an image of each EXIF orientation upright. ImageOps.exif_transpose also rewrites EXIF, and fails where
# that is broken.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def _open(path: str | Path, whole: bool = False) -> Iterator[Image.Image]:
    """Open an image of at most MAX_PIXELS; whatever a broken one raises inside becomes a FileError that names it."""
    limit = f"the limit of {MAX_PIXELS:,} (retinanet.data.images.MAX_PIXELS)"
    try:
        if not os.path.exists(path):  # noqa: PTH110, pathlib raises errors of its own for impossible names
            raise FileNotFoundError("the file does not exist")
        if not Path(path).is_file():
            raise OSError("it is not a file")
        if Path(path).stat().st_size > MAX_BYTES:
            raise OSError(f"it has more than {MAX_BYTES:,} bytes")
        with Image.open(io.BytesIO(Path(path).read_bytes()) if whole else path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise FileError(str(path), f"has {image.width} x {image.height} pixels, more than {limit}")
            yield image
    except FileError:
        raise
    except Image.DecompressionBombError as error:
        raise FileError(str(path), f"has more pixels than {limit}") from error
    except UnidentifiedImageError as error:
        with open(path, "rb") as file:
            start = shown(file.read(12))
        message = f"cannot be read as an image (it starts with {start}, and is none of {', '.join(FORMATS)})"
        raise FileError(str(path), message) from error
    except BROKEN_IMAGE as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise FileError(str(path), f"cannot be read as an image ({reason})") from error


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, from 1 to 8; 1, upright, in place of anything else."""
    # The method of the base class, because PNG's own decodes the whole image to find EXIF at its end.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1


def read_image(path: str | Path) -> np.ndarray:
    """Read an image of any common kind as RGB, turned upright as its EXIF orientation says.

    Grey, palette, CMYK and 16-bit images and those with an alpha channel are converted.

    Returns:
        [H, W, 3] uint8.

    Raises:
        FileError: the file is missing, truncated, larger than MAX_PIXELS, or not an image.
    """
    with _open(path, whole=True) as image:
        orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow turns TIFF files by itself
        if image.format in ("JPEG", "MPO") and orientation == 1 and JPEG_DECODERS:
            data = bytearray(image.fp.getbuffer())
            if data.endswith(b"\xff\xd9"):  # whole; decoders make up what is missing
                if "exif" in image.info:  # hidden: TorchCodec turns images by it, even where it is invalid
                    start = data.index(b"Exif\0\0")
                    data[start : start + 8] = bytes(8)
                pixels = next(iter(JPEG_DECODERS.values()))(torch.frombuffer(data, dtype=torch.uint8))
                return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        image.load()
        return to_rgb(image if orientation == 1 else image.transpose(TURNS[orientation]))


def open_image(path: str | Path) -> np.ndarray:
    """Open an image for reading parts of it: [H, W, 3] uint8 RGB as `read_image` gives it, by slicing.

    Raises:
        FileError: as `read_image`.
    """
    return read_image(path)


def to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode -> [H, W, 3] uint8."""
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper 8
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


class ImageHeader(NamedTuple):
    """What an image's file says before it is decoded."""

    height: int  # pixels, as `read_image` turns it
    width: int
    orientation: int  # of EXIF, from 1, upright, to 8: how the file stores it


def read_header(path: str | Path) -> ImageHeader:
    """Read an image's header.

    Raises:
        FileError: the file is missing, larger than MAX_PIXELS, or not an image.
    """
    with _open(path) as image:
        orientation = _orientation(image)
        width, height = image.size
        turned = orientation >= 5 and image.format != "TIFF"
    return ImageHeader(*((width, height) if turned else (height, width)), orientation)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@functools.lru_cache(maxsize=16)
def _plain_names(folder: str) -> dict[str, str]:
    """The names in a folder by what is left without letter case and Unicode forms."""
    try:
        return {_plain(name): name for name in os.listdir(folder)}  # noqa: PTH208
    except (OSError, ValueError):
        return {}


def missing_folder(path: str) -> str:
    """The first of the folders of a path that does not exist; empty where all do."""
    found = ""
    while (path := os.path.dirname(path)) not in ("", found) and not os.path.isdir(path):  # noqa: PTH112, PTH120
        found = path
    return found


def explain_missing(name: str, folder: str = "") -> str:
    """The message about an image that does not exist, with the file that does under nearly the same name."""
    path, found = os.path.join(folder, name), folder  # noqa: PTH118
    for part in Path(name.replace("\\", "/")).parts:
        whole = os.path.join(found, part)  # noqa: PTH118
        near = part if os.path.exists(whole) else _plain_names(found or ".").get(_plain(part))  # noqa: PTH110
        if near is None:
            parent = missing_folder(path)
            lost = f"; nor does its folder, {shown(parent)}" if parent else ""
            return f"image {shown(name)} does not exist{lost}" + "; is it a Windows path?" * ("\\" in name)
        found = os.path.join(found, near)  # noqa: PTH118
    same = found != path and len({unicodedata.normalize("NFC", name) for name in (found, path)}) == 1
    form = ", in another Unicode form (NFC or NFD)" if same else ""
    return f"image {shown(name)} does not exist, but {shown(found)} does{form}"


def walk(folder: Path, suffixes: Container[str]) -> Iterator[Path]:
    """The files of some suffixes, in lower case, in a folder and its subfolders, sorted; links are followed, once each.

    Names that start with a point are left out.
    """
    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)  # noqa: PTH116
        if (key := (status.st_dev, status.st_ino)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(key)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in suffixes and not name.startswith("."):  # noqa: PTH122, faster
                yield Path(parent, name)


def list_images(folder: Path, wanted: Container[str] | None = None, preferred: Container[str] = ()) -> dict[str, Path]:
    """The images of a folder and its subfolders, by their relative paths without suffix, sorted.

    Where two images of a name differ in their suffixes, one whose file name is `preferred` wins.

    Raises:
        UserError: the folder cannot be read, or two images of a `wanted` name (default: any) differ only in suffix.
    """
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a folder of images ({error.strerror})") from error
    found: dict[str, Path] = {}
    for path in walk(folder, IMAGE_SUFFIXES):
        name = path.relative_to(folder).with_suffix("").as_posix()
        other = found.setdefault(name, path)
        if (path.name in preferred) > (other.name in preferred):
            found[name] = path
        elif path != other and (other.name in preferred) == (path.name in preferred):
            if wanted is None or name in wanted:
                raise UserError(f"{path}: differs from {other.name} only in its suffix; remove one of them")
            found[name] = path
    return {name: found[name] for name in sorted(found, key=found.__getitem__)}


def find_images(patterns: Sequence[str]) -> list[Path]:
    """The files of `--images`, each once: files by name, images and videos of folders, matches of patterns.

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
