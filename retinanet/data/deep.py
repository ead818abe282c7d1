"""Images of more than 8 bits with all their bits, by Pillow: PNG, PNM, and those TIFF files that tifffile leaves."""

import math
import sys
from typing import BinaryIO

import numpy as np
from PIL import Image

from retinanet.data.pixels import Deferred, PixelRange

# How Pillow names 16-bit colours, of which it reads the upper byte alone -> what reads both bytes, one after the other.
HALVES = {
    f"{kind};16{order}": (f"{kind};16{order}", f"{kind};16{other}")
    for kind in ("RGB", "RGBX", "RGBA")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
} | {"LA;16B": ("RGBA",)}


def deep_pixels(image: Image.Image, file: BinaryIO) -> tuple[Deferred, PixelRange | None] | None:
    """The pixels of an image, and the range that its file declares; None where it has no more than 8 bits."""
    if not image.tile:
        return None
    decoder, _, start, rest = image.tile[0]
    mode, *rest = rest if isinstance(rest, tuple) else (rest,)
    size, bands, kind = image.size[::-1], len(image.getbands()), np.dtype(np.uint16)
    if decoder in ("ppm", "ppm_plain") and rest[0] > 255 and (decoder == "ppm" or image.mode == "I"):
        return Deferred((*size, bands), kind, lambda: _read_ppm(image, file, start, rest[0])), (0, rest[0])
    if image.mode == "F" or image.mode[:1] == "I":
        wide = {"F": np.dtype(np.float32), "I": np.dtype(np.int32)}
        kind = kind if mode == "I;16B" else wide.get(image.mode, kind)  # PGM's 16 bits are of the mode I
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
