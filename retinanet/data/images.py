"""Image files -> arrays, whatever their kind, and whatever is wrong with them."""

import contextlib
import functools
import glob
import io
import logging
import math
import os
import re
import struct
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from retinanet.data.pixels import Deferred, PixelRange, RawImage, is_hidden, pooled_range
from retinanet.data.report import FileError
from retinanet.data.tiff import TIFF_STARTS, has_more_pages, open_tiff
from retinanet.data.video import VIDEO_SUFFIXES
from retinanet.errors import UserError, shown
from retinanet.process import log

# Pillow warns of large, palette and oddly tagged images, which are read, without their names; torchvision of its end.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# What decodes JPEG, bytes [N] uint8 -> [3, H, W] uint8, best first, where it is installed. Pillow gives the same
# pixels, more slowly.
JPEG_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {}
PNG_DECODER: Callable[[Tensor], Tensor] | None = None  # torchvision's crashes on damaged files
with contextlib.suppress(Exception):  # whatever its libraries of other versions raise
    from torchcodec.decoders import decode_image

    JPEG_DECODERS["torchcodec"] = PNG_DECODER = functools.partial(decode_image, mode="RGB")
with contextlib.suppress(ImportError):  # torchvision 0.29 announces that it will go
    from torchvision.io import ImageReadMode, decode_jpeg

    JPEG_DECODERS["torchvision"] = functools.partial(decode_jpeg, mode=ImageReadMode.RGB)

# Formats that are read. Pillow knows more; some of them start other programs, or hold other files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
IMAGE_SUFFIXES = {
    *(".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
PIXEL_LIMIT = 179  # millions of pixels of an image; Pillow, too, takes a larger one for a decompression bomb
BYTES_A_PIXEL = 12  # of an image's file, at most: three numbers of 32 bits
LOOKS, SAMPLED = 500, 32  # images of a data set whose headers, and of those whose pixels choose its pixel range
LARGE = 2**24  # pixels from which `open_image` decodes parts where it can
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
# How Pillow names 16-bit colours, of which it reads the upper byte alone -> what reads both bytes, one after the other.
HALVES = {
    f"{kind};16{order}": (f"{kind};16{order}", f"{kind};16{other}")
    for kind in ("RGB", "RGBX", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
} | {"LA;16B": ("RGBA",)}
BITS, NUMBER_KIND, BANDS = 258, 339, 277  # tags of TIFF


@contextlib.contextmanager
def _open(path: str | Path, pixel_limit: float | None, whole: bool = False) -> Iterator[Image.Image | RawImage]:
    """Open an image of at most `pixel_limit` million pixels: by Pillow, unless that would lose bits or bands.

    Whatever a broken image raises inside becomes a FileError that names it.
    """
    try:
        if not os.path.exists(path):  # noqa: PTH110, pathlib raises errors of its own for impossible names
            raise FileNotFoundError("the file does not exist")
        if not Path(path).is_file():
            raise OSError("it is not a file")
        size = Path(path).stat().st_size
        if pixel_limit and size > (most := int(BYTES_A_PIXEL * pixel_limit * 1e6)):
            raise OSError(f"it has more than {most:,} bytes; --pixel_limit raises that")
        with open(path, "rb") as opened:
            file = io.BytesIO(opened.read()) if whole and size <= LARGE else opened
            image = _identify(file, path)
            raw = _open_raw(image, file, path)
            height, width, *_ = raw.shape if raw else image.size[::-1]
            if pixel_limit and width * height > pixel_limit * 1e6:
                message = f"has {width} x {height} pixels, more than the limit of {pixel_limit:g} million"
                raise FileError(str(path), f"{message}; --pixel_limit {-(-width * height // 10**6)} allows it")
            if pixel_limit and Image.MAX_IMAGE_PIXELS and width * height > 2 * Image.MAX_IMAGE_PIXELS:
                Image.MAX_IMAGE_PIXELS = width * height  # Pillow has a limit of its own, which this image may exceed
            yield raw or image
    except FileError:
        raise
    except Image.DecompressionBombError as error:  # of a part of the file
        raise FileError(str(path), f"cannot be read as an image ({error})") from error
    except UnidentifiedImageError as error:
        with open(path, "rb") as file:
            start = shown(file.read(12))
        message = f"cannot be read as an image (it starts with {start}, and is none of {', '.join(FORMATS)})"
        raise FileError(str(path), message) from error
    except BROKEN_IMAGE as error:
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise FileError(str(path), f"cannot be read as an image ({reason})") from error


def _identify(file: BinaryIO, path: str | Path) -> Image.Image | None:
    """The image as Pillow recognises it; other than Image.open, of any size, because this decodes nothing."""
    Image.init()  # only once
    start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept(start) is True:
            file.seek(0)
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                return factory(file, path)
    return None


def _open_raw(image: Image.Image | None, file: BinaryIO, path: str | Path) -> RawImage | None:
    """An image that Pillow does not read, or with fewer bits or bands; None for all others.

    Raises:
        UnidentifiedImageError: it is of no known format.
    """
    if image is not None and image.format != "TIFF":
        return (found := _deep_pixels(image, file)) and RawImage(*found, orientation=_orientation(image))
    if image is not None and max(image.tag_v2.get(BITS, (1,))) <= 8 and max(image.tag_v2.get(NUMBER_KIND, (1,))) == 1:
        raw = open_tiff(path, None) if image.width * image.height > LARGE else None
        return raw if raw and raw.by_parts and raw.orientation == 1 else None
    file.seek(0)
    if image is None and file.read(4) not in TIFF_STARTS:
        raise UnidentifiedImageError
    found = image and _deep_pixels(image, file)
    raw = open_tiff(path, found and found[0])
    if raw is None and image is None:
        raise ValueError("its colours are neither RGB nor grey")
    return raw


def _deep_pixels(image: Image.Image, file: BinaryIO) -> tuple[Deferred, PixelRange | None] | None:
    """The pixels of an image of more than 8 bits as Pillow reads them, and the range that its file declares."""
    if not image.tile:
        return None
    decoder, _, start, rest = image.tile[0]
    mode, *rest = rest if isinstance(rest, tuple) else (rest,)
    size, bands, kind = image.size[::-1], len(image.getbands()), np.dtype(np.uint16)
    if decoder in ("ppm", "ppm_plain") and rest[0] > 255 and (decoder == "ppm" or image.mode == "I"):
        return Deferred((*size, bands), kind, lambda: _read_ppm(image, file, start, rest[0])), (0, rest[0])
    if image.mode == "F" or image.mode[:1] == "I":
        kind = {"F": np.dtype(np.float32), "I": np.dtype(np.int32)}.get(image.mode, kind)
        pixels = Deferred((*size, 1), kind, lambda: np.asarray(image).astype(kind)[:, :, None])
    elif mode in HALVES:
        pixels = Deferred((*size, 1 if mode == "LA;16B" else 3), kind, lambda: _join_halves(image, file, mode))
    else:
        return None
    return pixels, _significant_bits(file) if image.format == "PNG" else None


def _read_ppm(image: Image.Image, file: BinaryIO, start: int, largest: int) -> np.ndarray:
    """[H, W, C] uint16 up to `largest`, to which Pillow's numbers, in plain text up to 65535, are scaled back."""
    if image.tile[0][0] == "ppm_plain":
        return np.rint(np.asarray(image) * (largest / 65535)).astype(np.uint16)[:, :, None]
    shape = *image.size[::-1], len(image.getbands())
    file.seek(start)
    return np.frombuffer(file.read(2 * math.prod(shape)), ">u2").reshape(shape).astype(np.uint16)


def _join_halves(image: Image.Image, file: BinaryIO, mode: str) -> np.ndarray:
    """[H, W, C] uint16 where Pillow reads upper bytes alone: in the other byte order, those are the lower ones."""
    halves = []
    for half_mode in HALVES[mode]:
        file.seek(0)
        half = type(image)(file, image.filename)
        half.tile = [
            tile._replace(args=(half_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else half_mode)
            for tile in half.tile
        ]
        halves.append(np.asarray(half).astype(np.uint16))
    if len(halves) == 1:  # grey and alpha, of two bytes each
        return halves[0][:, :, :1] << 8 | halves[0][:, :, 1:2]
    return (halves[0] << 8 | halves[1])[:, :, :3]


def _significant_bits(file: BinaryIO) -> PixelRange | None:
    """The range that a PNG declares by sBIT."""
    file.seek(0)
    start = file.read(4096)
    if (place := start.find(b"sBIT")) < 4:
        return None
    bits = max(start[place + 4 : place + 4 + start[place - 1]], default=16)
    return (0, 2**bits - 1) if 8 < bits < 16 else None


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, from 1 to 8; 1, upright, in place of anything else."""
    # The method of the base class, because PNG's own decodes the whole image to find EXIF at its end.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and orientation in TURNS else 1


def read_image(path: str | Path, pixel_range: PixelRange | None = None, pixel_limit: float = PIXEL_LIMIT) -> np.ndarray:
    """Read an image of any common kind as RGB, turned upright as its EXIF orientation says.

    Grey, palette and CMYK images are converted; of those with alpha or more bands, the first three are taken.

    Args:
        path: the file.
        pixel_range: what becomes black and white in images of more than 8 bits; default: see `pixels`, of this image.
        pixel_limit: millions of pixels that the image may have.

    Returns:
        [H, W, 3] uint8.

    Raises:
        FileError: the file is missing, truncated, larger than the limit, or not an image.
    """
    with _open(path, pixel_limit, whole=True) as image:
        if isinstance(image, RawImage):
            return _turn(image.decode(pixel_range), image.orientation)
        orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow turns TIFF files by itself
        if image.format in ("JPEG", "MPO") and orientation == 1 and JPEG_DECODERS:
            image.fp.seek(0)
            data = bytearray(image.fp.read())
            if data.endswith(b"\xff\xd9"):  # whole; decoders make up what is missing
                if "exif" in image.info:  # hidden: TorchCodec turns images by it, even where it is invalid
                    start = data.index(b"Exif\0\0")
                    data[start : start + 8] = bytes(8)
                pixels = next(iter(JPEG_DECODERS.values()))(torch.frombuffer(data, dtype=torch.uint8))
                return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
        large = image.width * image.height > LARGE
        if large and image.format == "PNG" and image.mode == "RGB" and "exif" not in image.info and PNG_DECODER:
            data = torch.from_file(str(path), False, Path(path).stat().st_size, dtype=torch.uint8)
            return PNG_DECODER(data).permute(1, 2, 0).numpy()  # in half of Pillow's memory
        image.load()
        return _turn(to_rgb(image), orientation)


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, 3] as a file stores it -> upright."""
    turn = TURNS.get(orientation)
    return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def open_image(
    path: str | Path, pixel_range: PixelRange | None = None, pixel_limit: float = PIXEL_LIMIT
) -> np.ndarray | RawImage:
    """Open an image of which parts are wanted.

    Arguments and errors are those of `read_image`; a part may be found damaged only when it is read.

    Returns:
        What `read_image` gives; or, of TIFF files of more than LARGE pixels whose compression allows it, an object
        with `shape` [H, W, 3] that gives the same when sliced by rows and columns, and decodes no more than that.
    """
    with _open(path, pixel_limit) as image:
        is_raw = isinstance(image, RawImage)
        if is_raw and image.by_parts and image.orientation == 1 and math.prod(image.shape[:2]) > LARGE:
            image.pixel_range = pixel_range
            return image
    return read_image(path, pixel_range, pixel_limit)


def to_rgb(image: Image.Image, pixel_range: PixelRange | None = None) -> np.ndarray:
    """A Pillow image of any mode -> [H, W, 3] uint8; `pixel_range` as in `read_image`."""
    if image.mode == "F" or image.mode[:1] == "I":
        values = np.asarray(image)
        return RawImage(values.astype(values.dtype.newbyteorder("="))).decode(pixel_range)
    rows = max(1, LARGE // image.width)
    if image.height <= rows:
        return np.array(image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, rows):  # in parts, because Pillow copies what it converts
        pixels[top : top + rows] = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGB")
    return pixels


class ImageHeader(NamedTuple):
    """What an image's file says before it is decoded."""

    height: int  # pixels, as `read_image` turns it
    width: int
    orientation: int  # of EXIF, from 1, upright, to 8: how the file stores it


def read_header(path: str | Path, pixel_limit: float | None = None) -> ImageHeader:
    """Read an image's header.

    Raises:
        FileError: the file is missing, has more than `pixel_limit` million pixels, or is not an image.
    """
    with _open(path, pixel_limit) as image:
        if isinstance(image, RawImage):
            height, width, _ = image.shape
            return ImageHeader(*((width, height) if image.orientation >= 5 else (height, width)), image.orientation)
        orientation = _orientation(image)
        width, height = image.size
        turned = orientation >= 5 and image.format != "TIFF"
    return ImageHeader(*((width, height) if turned else (height, width)), orientation)


def choose_pixel_range(
    files: Sequence[str], given: PixelRange | None = None, pixel_limit: float = PIXEL_LIMIT
) -> PixelRange | None:
    """The one range for the images of a data set that have more than 8 bits: the given one, or else their own.

    At most LOOKS of the files are looked at, always the same ones. What is not read of them is logged, once for all,
    and so is what is nearly black or white in the range.

    Returns:
        The range; None where none is given, and all images have 8 bits.
    """
    deep, extra, pages = [], [], []
    for path in evenly(files, LOOKS):
        with contextlib.suppress(FileError), _open(path, None) as image:
            is_deep, bands, has_pages = _look_at(image, path)
            deep += [path] * is_deep
            extra += [path] * (bands == 2 or bands > 3)
            pages += [path] * has_pages
    for found, text in (
        (extra, "bands beyond red, green and blue, or beyond grey, such as alpha or near infrared; they are not read"),
        (pages, "several pages, of which the first is read"),
    ):
        if found:
            log.info("some images have %s (%s%s)", text, shown(str(found[0])), ", ..." * (len(found) > 1))
    samples = {}
    for path in evenly(deep, SAMPLED):
        with contextlib.suppress(FileError), _open(path, pixel_limit) as image:
            samples[path] = image.sample()
    if not samples:
        return given
    low, high = pixel_range = given or pooled_range(samples.values())
    if given is None:
        kinds = ", ".join(sorted({str(sample.dtype) for sample in samples.values()}))
        log.info("pixels of %s: %g becomes black, %g white (--pixel_range)", kinds, low, high)
    if hidden := [path for path, sample in samples.items() if is_hidden(sample, pixel_range)]:
        text = "warning: %d of %d images of more than 8 bits are nearly black or white in this range, the first is %s: "
        text += "are they of another kind than the others? Another --pixel_range, or one scale for all files, may help"
        log.warning(text, len(hidden), len(samples), shown(str(hidden[0])))
    return pixel_range


def _look_at(image: Image.Image | RawImage, path: str) -> tuple[bool, int, bool]:
    """Whether an image has more than 8 bits, its number of bands, and whether it has pages that are not read."""
    is_raw = isinstance(image, RawImage)
    bands = image.values.shape[2] if is_raw else 3 if image.mode == "CMYK" else len(image.getbands())
    if not is_raw and image.format == "TIFF" and image.mode != "CMYK":
        bands = image.tag_v2.get(BANDS, bands)
    return is_raw and image.values.dtype not in (np.uint8, np.bool_), bands, has_more_pages(path)


def evenly(items: Sequence[str], number: int) -> list[str]:
    """At most so many of the items, from the first to the last."""
    places = np.unique(np.linspace(0, len(items) - 1, min(number, len(items))).astype(int))
    return [items[place] for place in places]


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
