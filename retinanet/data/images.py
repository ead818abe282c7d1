"""Image files of any kind -> arrays, or clear errors.

Pillow reads 8-bit images, except that JPEG is decoded by something faster if it is installed. Images of which Pillow
would lose bits or bands become a `pixels.RawImage`, read by tifffile (see `tiff`) or by Pillow in its own modes (see
`deep`).
"""

import contextlib
import functools
import logging
import os
import struct
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL
from torch import Tensor

from retinanet.data.deep import deep_pixels
from retinanet.data.files import evenly, reading
from retinanet.data.pixels import PixelRanges, RawImage, is_hidden, pooled_range, range_of
from retinanet.data.report import FileError
from retinanet.data.tiff import TIFF_STARTS, has_more_pages, open_tiff
from retinanet.errors import shown
from retinanet.process import log, progress

# Pillow warns about large, palette and oddly tagged images, which are read nevertheless, without naming them;
# torchvision warns about the removal of its decoder.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torchvision\.io")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# The installed decoders of JPEG, bytes [N] uint8 -> [3, H, W] uint8, best first. Pillow gives the same pixels, but more
# slowly.
JPEG_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {}
with contextlib.suppress(Exception):  # mismatched versions of its libraries raise errors of many types
    from torchcodec.decoders import decode_image

    JPEG_DECODERS["torchcodec"] = functools.partial(decode_image, mode="RGB")
with contextlib.suppress(ImportError):  # torchvision 0.29 announces its removal
    from torchvision.io import ImageReadMode, decode_jpeg

    JPEG_DECODERS["torchvision"] = functools.partial(decode_jpeg, mode=ImageReadMode.RGB)

# Formats that are read. Pillow knows more, but some of them start other programs or refer to other files.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXEL_LIMIT = 179  # millions of pixels of an image; Pillow, too, takes a larger one for a decompression bomb
PILLOW_LIMIT, PILLOW_LOCK = 2 * 89_478_485, threading.Lock()  # pixels; Pillow's setting is global to the process
LOOKS, SAMPLED = 500, 32  # images whose bands are looked at; images of each type whose pixels choose its range
LARGE = 2**24  # pixels above which `open_image` decodes parts if it can


@contextlib.contextmanager
def _open(path: str | Path, pixel_limit: float | None) -> Iterator[Image.Image | RawImage]:
    """Open an image of at most `pixel_limit` million pixels, by Pillow unless that would lose bits or bands."""
    with reading(path):
        if not os.path.isfile(path):  # noqa: PTH113, pathlib raises errors of its own for impossible names
            raise OSError("it is not a file" if os.path.exists(path) else "the file does not exist")  # noqa: PTH110
        with open(path, "rb") as file:
            image = _identify(file, path)
            image = _open_raw(image, path) or image
            height, width = image.shape[:2] if isinstance(image, RawImage) else image.size[::-1]
            pixels = width * height
            if pixel_limit and pixels > pixel_limit * 1e6:
                message = f"has {width} x {height} pixels, more than the limit of {pixel_limit:g} million"
                raise FileError(str(path), f"{message}; --pixel_limit {-(-pixels // 10**6)} allows it")
            with _allowed_by_pillow(pixels) if pixels > PILLOW_LIMIT else contextlib.nullcontext():
                yield image


def _identify(file: BinaryIO, path: str | Path) -> Image.Image | None:
    """The image as Pillow recognises it; None for a TIFF file that it cannot read.

    Image.open is not used because it refuses images above Pillow's own limit of pixels, though it decodes nothing.
    """
    Image.init()  # does nothing the second time
    start = file.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept(start) is True:
            file.seek(0)
            with contextlib.suppress(SyntaxError, LookupError, TypeError, struct.error):
                return factory(file, path)
    if start[:4] not in TIFF_STARTS:
        raise OSError(f"it starts with {shown(start[:12])}, and is none of {', '.join(FORMATS)}")
    return None


@contextlib.contextmanager
def _allowed_by_pillow(pixels: int) -> Iterator[None]:
    """Raise Pillow's own limit, which it also applies when it decodes TIFF files."""
    with PILLOW_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open_raw(image: Image.Image | None, path: str | Path) -> RawImage | None:
    """An image that Pillow cannot read, or only with fewer bits or bands, as a RawImage; None for all others."""
    if image is None:
        if raw := open_tiff(path):
            return raw
        raise ValueError("its colours are neither RGB nor grey")
    deep = deep_pixels(image)
    if image.format != "TIFF":
        return deep and RawImage(*deep, orientation=_orientation(image))
    tags = image.tag_v2
    if max(tags.get(BITSPERSAMPLE, (1,))) <= 8 and max(tags.get(SAMPLEFORMAT, (1,))) == 1:
        raw = open_tiff(path) if image.width * image.height > LARGE else None
        return raw if raw and raw.by_parts else None
    return open_tiff(path, deep and deep[0])


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, from 1 to 8; anything else counts as 1, upright."""
    # The base class's method, because that of PNG decodes the whole image to find EXIF data at its end.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) and orientation in range(1, 9) else 1


def read_image(path: str | Path, pixel_range: PixelRanges = None, pixel_limit: float = PIXEL_LIMIT) -> np.ndarray:
    """Read an image of any common kind as RGB, [H, W, 3] uint8, turned upright as its EXIF orientation says.

    Grey, palette and CMYK images are converted; of images with alpha or more bands, the first three bands are used.

    Args:
        pixel_range: the values that become black and white in images of more than 8 bits, for all types or a dict by
            type; default: this image's own range, see `pixels`.
        pixel_limit: millions of pixels that the image may have.

    Raises:
        FileError: the file is missing, truncated, larger than the limit, or not an image.
    """
    with _open(path, pixel_limit) as image:
        if isinstance(image, RawImage):
            pixels, orientation = image.decode(pixel_range), 1 if image.is_upright else image.orientation
        else:
            orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow itself turns TIFF upright
            pixels = _decode_jpeg(image) if image.format in ("JPEG", "MPO") and orientation == 1 else None
            if pixels is None:
                image.load()
                pixels = to_rgb(image)
        return _turned(pixels, orientation)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels [H, W, 3] as stored with an EXIF orientation -> upright. Faster than Pillow's `exif_transpose`."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _decode_jpeg(image: Image.Image) -> np.ndarray | None:
    """[H, W, 3] by the best of JPEG_DECODERS; None without one, or for truncated files, which they do not notice."""
    image.fp.seek(0)
    data = bytearray(image.fp.read())
    if not JPEG_DECODERS or not data.endswith(b"\xff\xd9"):
        return None
    if "exif" in image.info:  # hidden: TorchCodec turns images by it, even where it is invalid
        start = data.index(b"Exif\0\0")
        data[start : start + 8] = bytes(8)
    pixels = next(iter(JPEG_DECODERS.values()))(torch.frombuffer(data, dtype=torch.uint8))
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def open_image(
    path: str | Path, pixel_range: PixelRanges = None, pixel_limit: float = PIXEL_LIMIT
) -> np.ndarray | RawImage:
    """Open an image to read parts of it; arguments and errors are those of `read_image`.

    Returns the same array; or, for TIFF files of more than LARGE pixels whose compression allows it, an object with
    `shape` [H, W, 3] that gives the same pixels when sliced by rows and columns, and decodes no more than needed.
    Damage in such a file is found only when the damaged part is read.
    """
    with _open(path, pixel_limit) as image:
        if isinstance(image, RawImage) and image.by_parts and image.shape[0] * image.shape[1] > LARGE:
            image.ranges = pixel_range
            return image
    return read_image(path, pixel_range, pixel_limit)


def to_rgb(image: Image.Image, pixel_range: PixelRanges = None) -> np.ndarray:
    """A Pillow image of any mode -> [H, W, 3] uint8; `pixel_range` as in `read_image`."""
    if image.mode == "F" or image.mode[:1] == "I":
        values = np.asarray(image)
        return RawImage(values.astype(values.dtype.newbyteorder("="))).decode(pixel_range)
    pixels, rows = np.empty((image.height, image.width, 3), dtype=np.uint8), max(1, LARGE // image.width)
    for top in range(0, image.height, rows):  # in parts, because Pillow makes a copy to convert
        part = image.crop((0, top, image.width, min(top + rows, image.height))) if rows < image.height else image
        pixels[top : top + rows] = part.convert("RGB")
    return pixels


class ImageHeader(NamedTuple):
    """What an image's header says."""

    height: int  # pixels, after `read_image` turns the image upright
    width: int
    orientation: int  # EXIF's, from 1 (upright) to 8: how the file stores the image


def read_header(path: str | Path, pixel_limit: float | None = None) -> ImageHeader:
    """Read an image's header; errors are those of `read_image`."""
    with _open(path, pixel_limit) as image:
        if isinstance(image, RawImage):
            size, orientation, is_upright = image.shape[:2], image.orientation, image.is_upright
        else:
            size, orientation, is_upright = image.size[::-1], _orientation(image), image.format == "TIFF"
    return ImageHeader(*(size[::-1] if orientation >= 5 and not is_upright else size), orientation)


def choose_pixel_range(
    files: Sequence[str], given: PixelRanges = None, pixel_limit: float = PIXEL_LIMIT
) -> PixelRanges:
    """The range of each type of a data set's images of more than 8 bits: the given one, or else the images' own.

    Logs, once for all files, which bands and pages are not read, and which images are nearly black or white.
    """
    chosen = {}
    for name, paths in sorted(_find_deep(files).items()):
        samples, declared = {}, []
        for path in evenly(paths, SAMPLED):
            with contextlib.suppress(FileError), _open(path, pixel_limit) as image:
                samples[path] = image.sample()
                declared.append(image.declared)
        if not samples:
            continue
        chosen[name] = range_of(given, np.dtype(name))
        if chosen[name] is None:
            chosen[name] = pooled_range([*samples.values()], declared)
            log.info("pixels of %s: %g becomes black, %g white (--pixel_range)", name, *chosen[name])
        if hidden := [path for path, sample in samples.items() if is_hidden(sample, chosen[name])]:
            text = "warning: %d of %d images of %s are nearly black or white in this range, the first of them %s; if "
            text += "they differ in kind from the others, another --pixel_range, or one scale for all files, may help"
            log.warning(text, len(hidden), len(samples), name, shown(str(hidden[0])))
    return given if isinstance(given, tuple) else {**chosen, **(given or {})} or None


def _find_deep(files: Sequence[str]) -> dict[str, list[str]]:
    """The images of more than 8 bits by the type of their pixels; logs which bands and pages are not read."""
    deep, extra_bands, more_pages = defaultdict(list), [], []
    looks = {*evenly(files, LOOKS)}
    for path in progress(files, "looking for deep images"):
        with contextlib.suppress(FileError), reading(path):
            if path not in looks and not _may_be_deep(path):
                continue
            with _open(path, None) as image:
                if isinstance(image, RawImage) and image.is_deep:
                    deep[image.values.dtype.name].append(path)
                if _bands(image) not in (1, 3):
                    extra_bands.append(path)
            if has_more_pages(path):
                more_pages.append(path)
    for paths, what in (
        (extra_bands, "bands beyond RGB or grey, such as alpha or near infrared, which are not read"),
        (more_pages, "several pages, of which only the first is read"),
    ):
        if paths:
            log.info("some images have %s (%s%s)", what, shown(str(paths[0])), ", ..." if len(paths) > 1 else "")
    return deep


def _may_be_deep(path: str) -> bool:
    """Whether a file's first bytes say that it is a TIFF, a PNM, or a PNG of 16 bits."""
    with open(path, "rb") as file:
        start = file.read(25)
    return start[:4] in TIFF_STARTS or start[:2] in (b"P2", b"P3", b"P5", b"P6", b"Pf") or start[24:] == b"\x10"


def _bands(image: Image.Image | RawImage) -> int:
    """The number of bands in an image's file; CMYK counts as three."""
    if isinstance(image, RawImage):
        return image.values.shape[2]
    if image.mode == "CMYK":
        return 3
    bands = len(image.getbands())
    return image.tag_v2.get(SAMPLESPERPIXEL, bands) if image.format == "TIFF" else bands
