"""Reading images of more than 8 bits by Pillow without losing bits: PNG, PNM, and TIFF that tifffile cannot read."""

import math
import re
import sys
from typing import BinaryIO

import numpy as np
from PIL import Image

from retinanet.data.pixels import Deferred, PixelRange

# Pillow's names of 16-bit colours. It reads only their upper bytes, which in the other byte order are the lower ones.
COLOURS = re.compile(r"RGB[XA]?;16[BLN]")
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def deep_pixels(image: Image.Image, file: BinaryIO) -> tuple[Deferred, PixelRange | None] | None:
    """The pixels of an image, and the range that its file declares; None if it has at most 8 bits."""
    if not image.tile:
        return None
    decoder, _, start, rest = image.tile[0]
    mode, *rest = rest if isinstance(rest, tuple) else (rest,)
    size, bands, kind = image.size[::-1], len(image.getbands()), np.dtype(np.uint16)
    if decoder in ("ppm", "ppm_plain") and rest[0] > 255 and (decoder == "ppm" or image.mode == "I"):
        return Deferred((*size, bands), kind, lambda: _read_ppm(image, file, start, rest[0])), (0, rest[0])
    if image.mode == "F" or image.mode[:1] == "I":
        wide = {"F": np.dtype(np.float32), "I": np.dtype(np.int32)}
        kind = kind if mode == "I;16B" else wide.get(image.mode, kind)  # Pillow gives PGM's 16 bits the mode I
        pixels = Deferred((*size, 1), kind, lambda: np.asarray(image).astype(kind)[:, :, None])
    elif mode == "LA;16B":
        pixels = Deferred((*size, 1), kind, lambda: _read_grey_and_alpha(image, file))
    elif COLOURS.fullmatch(str(mode)):  # in GIF, `mode` is an integer
        pixels = Deferred((*size, 3), kind, lambda: _read_colours(image, file, mode))
    else:
        return None
    return pixels, _significant_bits(file) if image.format == "PNG" else None


def _read_ppm(image: Image.Image, file: BinaryIO, start: int, largest: int) -> np.ndarray:
    """[H, W, C] uint16 up to `largest`; from plain text Pillow gives numbers up to 65535, which are scaled back."""
    if image.tile[0][0] == "ppm_plain":
        return np.rint(np.asarray(image) * (largest / 65535)).astype(np.uint16)[:, :, None]
    shape = *image.size[::-1], len(image.getbands())
    file.seek(start)
    return np.frombuffer(file.read(2 * math.prod(shape)), ">u2").reshape(shape).astype(np.uint16)


def _read_as(image: Image.Image, file: BinaryIO, mode: str) -> np.ndarray:
    """[H, W, C] uint8: what Pillow reads if the file's bytes are taken for those of another mode."""
    file.seek(0)
    again = type(image)(file, image.filename)
    again.tile = [
        tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode) for tile in again.tile
    ]
    return np.asarray(again)


def _read_grey_and_alpha(image: Image.Image, file: BinaryIO) -> np.ndarray:
    """[H, W, 1] uint16: the grey band. Two bands of two bytes are read as the four bytes of an RGBA pixel."""
    return _read_as(image, file, "RGBA").copy().view(">u2")[:, :, :1].astype(np.uint16)


def _read_colours(image: Image.Image, file: BinaryIO, mode: str) -> np.ndarray:
    """[H, W, 3] uint16, from the upper bytes and from the lower ones, which Pillow reads in the other byte order."""
    other = mode[:-1] + OTHER_ORDER[mode[-1]]
    high, low = (_read_as(image, file, one)[:, :, :3].astype(np.uint16) for one in (mode, other))
    return high << 8 | low


def _significant_bits(file: BinaryIO) -> PixelRange | None:
    """The range that a PNG declares with sBIT."""
    file.seek(0)
    found = re.search(rb"\0\0\0[\1-\4]sBIT(.)", file.read(4096), re.DOTALL)
    bits = found[1][0] if found else 16
    return (0, 2**bits - 1) if 8 < bits < 16 else None
