"""Reading images of more than 8 bits by Pillow without losing bits: PNG, PNM, and TIFF that tifffile cannot read."""

import math
import re
import sys

import numpy as np
from PIL import Image

from retinanet.data.pixels import Deferred, PixelRange

# Pillow's names of 16-bit colours. It reads only their upper bytes, which in the other byte order are the lower ones.
COLOURS = re.compile(r"RGB[XA]?;16[BLN]")
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}


def deep_pixels(image: Image.Image) -> tuple[Deferred, PixelRange | None] | None:
    """The pixels of an image, and the range that its file declares; None if it has at most 8 bits."""
    if not image.tile:
        return None
    decoder, _, _, arguments = image.tile[0]
    mode, *rest = arguments if isinstance(arguments, tuple) else (arguments,)
    size, kind = image.size[::-1], np.dtype(np.uint16)
    if decoder in ("ppm", "ppm_plain") and rest[0] > 255 and (decoder == "ppm" or image.mode == "I"):
        return Deferred((*size, len(image.getbands())), kind, lambda: _read_ppm(image, rest[0])), (0, rest[0])
    if image.mode == "F" or image.mode[:1] == "I":
        wide = {"F": np.dtype(np.float32), "I": np.dtype(np.int32)}
        kind = kind if mode == "I;16B" else wide.get(image.mode, kind)  # Pillow gives PGM's 16 bits the mode I
        pixels = Deferred((*size, 1), kind, lambda: np.asarray(image)[:, :, None])
    elif mode == "LA;16B":  # two bands of two bytes are read as the four bytes of an RGBA pixel
        pixels = Deferred((*size, 1), kind, lambda: _read_as(image, "RGBA").copy().view(">u2")[:, :, :1])
    elif COLOURS.fullmatch(str(mode)):  # in GIF, `mode` is an integer
        pixels = Deferred((*size, 3), kind, lambda: _read_colours(image, mode))
    else:
        return None
    return pixels, _significant_bits(image) if image.format == "PNG" else None


def _read_ppm(image: Image.Image, largest: int) -> np.ndarray:
    """[H, W, C] up to `largest`; from plain text Pillow gives numbers up to 65535, which are scaled back."""
    decoder, _, start, _ = image.tile[0]
    if decoder == "ppm_plain":
        return np.rint(np.asarray(image) * (largest / 65535))[:, :, None]
    shape = *image.size[::-1], len(image.getbands())
    image.fp.seek(start)
    return np.frombuffer(image.fp.read(2 * math.prod(shape)), ">u2").reshape(shape)


def _read_as(image: Image.Image, mode: str) -> np.ndarray:
    """[H, W, C] uint8: what Pillow reads if the file's bytes are taken for those of another mode."""
    image.fp.seek(0)
    again = type(image)(image.fp, image.filename)
    again.tile = [
        tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode) for tile in again.tile
    ]
    return np.asarray(again)


def _read_colours(image: Image.Image, mode: str) -> np.ndarray:
    """[H, W, 3] uint16, from the upper bytes and from the lower ones, which Pillow reads in the other byte order."""
    other = mode[:-1] + OTHER_ORDER[mode[-1]]
    high, low = (_read_as(image, one)[:, :, :3].astype(np.uint16) for one in (mode, other))
    return high << 8 | low


def _significant_bits(image: Image.Image) -> PixelRange | None:
    """The range that a PNG declares with sBIT."""
    image.fp.seek(0)
    found = re.search(rb"\0\0\0[\1-\4]sBIT(.)", image.fp.read(4096), re.DOTALL)
    bits = found[1][0] if found else 16
    return (0, 2**bits - 1) if 8 < bits < 16 else None
