"""TIFF files that Pillow cannot read, or only with fewer bits, or only as a whole: tifffile reads them."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from retinanet.data.files import reading
from retinanet.data.pixels import Deferred, PixelRange, RawImage

if TYPE_CHECKING:
    from tifffile import TiffPage

CACHE = 2**27  # bytes of decoded strips or tiles to keep; enough for a row of tiles of a wide image
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class Segments:
    """A TIFF image [H, W, C]: a slice decodes the strips or tiles that it touches, and has at most three bands."""

    def __init__(self, path: str | Path, page: "TiffPage"):
        self.path, self.page, self.dtype = path, page, page.dtype
        self.planes, _, height, width, samples = page.shaped
        self.shape = (height, width, self.planes * samples)
        self.side = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
        self.across = -(-width // self.side[1])
        self.number = -(-height // self.side[0]) * self.across  # of segments of a plane
        if len(page.dataoffsets) < self.planes * self.number:
            raise ValueError("it lists fewer strips or tiles than its size needs")
        kept = CACHE // (math.prod(self.side) * samples * self.dtype.itemsize)
        self._segment = functools.lru_cache(max(1, kept))(self._decode)

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        top, bottom, _ = window[0].indices(self.shape[0])
        left, right, _ = window[1].indices(self.shape[1])
        height, width = self.side

        def row(plane: int, y: int) -> np.ndarray:
            first = plane * self.number + y * self.across
            ys = slice(max(0, top - y * height), bottom - y * height)
            columns = range(left // width, -(-right // width))
            parts = [self._segment(first + x)[ys, max(0, left - x * width) : right - x * width, :3] for x in columns]
            return np.concatenate(parts, axis=1)

        with reading(self.path):
            rows = range(top // height, -(-bottom // height))
            planes = [np.concatenate([row(plane, y) for y in rows]) for plane in range(min(self.planes, 3))]
            return np.concatenate(planes, axis=2)

    def _decode(self, index: int) -> np.ndarray:
        """One strip or tile [h, w, samples]."""
        page = self.page
        with _explained(), open(self.path, "rb") as file:
            file.seek(page.dataoffsets[index])
            data = file.read(page.databytecounts[index])
            if len(data) < page.databytecounts[index]:
                raise ValueError("image file is truncated")
            values, _, shape = page.decode(data or None, index, jpegtables=page.jpegtables)  # no data: sparse file
        return np.full(shape[1:], page.nodata, self.dtype) if values is None else values[0]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    from tifffile import TiffFileError

    try:
        yield
    except TiffFileError as error:
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def _first_page(path: str | Path) -> "Iterator[TiffPage]":
    from tifffile import TiffFile  # here, because it takes a tenth of a second and few images need it

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it warns of files that are read, or that raise errors
    with _explained(), TiffFile(path) as file:
        if not len(file.pages):
            raise ValueError("it holds no image")
        page = file.pages.first
        if page.dtype is None or page.dtype.kind not in "buif" or not math.prod(page.shaped) or page.shaped[1] != 1:
            kind = f"{page.bitspersample} bits per sample of type {page.dtype}"
            raise ValueError(f"images of shape {page.shape} with {kind} are not supported")
        yield page


def has_more_pages(path: str | Path) -> bool:
    """Whether a file is a TIFF file with more images than the first one and its smaller copies and masks."""
    with open(path, "rb") as file:
        if file.read(4) not in TIFF_STARTS:
            return False
    with _first_page(path) as page:
        return any(not (other.is_reduced or other.is_mask) for other in page.parent.pages[1:16])


def open_tiff(path: str | Path, by_pillow: Deferred | None = None) -> RawImage | None:
    """A TIFF file's first image; None for colours other than RGB and grey, which are left to Pillow.

    `by_pillow`, which is upright, is used if tifffile would need imagecodecs, but that is not installed.
    """
    from tifffile import EXTRASAMPLE, PHOTOMETRIC, TIFF

    with _first_page(path) as page:
        if page.photometric not in (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK, PHOTOMETRIC.RGB):
            return None
        orientation = page.tags.valueof("Orientation")
        orientation = orientation if orientation in range(1, 9) else 1
        whole_bytes = page.bitspersample == 8 * page.dtype.itemsize
        decodable = whole_bytes and page.compression in TIFF.DECOMPRESSORS and page.predictor in TIFF.UNPREDICTORS
        is_upright = by_pillow is not None and not decodable
        if is_upright:
            values = by_pillow
        elif page.is_final and whole_bytes:
            planes, _, height, width, samples = page.shaped  # planes or samples: 1
            if page.dataoffsets[0] + page.nbytes > page.parent.filehandle.size:
                raise ValueError("image file is truncated")
            stored = page.dtype.newbyteorder(page.parent.byteorder)
            values = np.memmap(path, stored, "r", page.dataoffsets[0], (planes, height, width, samples))
            values = np.moveaxis(values, 0, 2).reshape(height, width, -1)
        else:
            values = Segments(path, page)
        by_parts = decodable and EXTRASAMPLE.ASSOCALPHA not in page.extrasamples and orientation == 1
        inverted = page.photometric == PHOTOMETRIC.MINISWHITE
        return RawImage(values, *_declarations(page), inverted, orientation, is_upright, by_parts)


def _declarations(page: "TiffPage") -> tuple[PixelRange | None, float | None]:
    """The range that a file declares, unless it is the full range of its data type, and its value of missing pixels."""
    bits, is_unsigned = page.bitspersample, page.dtype.kind == "u"
    full = 2.0**bits - 1
    low, high = (0.0, full) if is_unsigned else (-math.inf, math.inf)
    for tags in (("SMinSampleValue", "SMaxSampleValue"), ("MinSampleValue", "MaxSampleValue")):
        lows, highs = (np.ravel(page.tags.valueof(tag, ())) for tag in tags)
        if len(highs):
            low, high = float(min(lows, default=low)), float(max(highs))
            break
    nodata = None
    with contextlib.suppress(ValueError):
        nodata = float(page.tags.valueof("GDAL_NODATA", ""))
    says_more = bits < 8 * page.dtype.itemsize or (low, high) != (0, full)
    return (low, high) if -math.inf < low < high < math.inf and says_more else None, nodata
