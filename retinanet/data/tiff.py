"""TIFF files that Pillow does not read, reads with fewer bits, or reads whole where a part is enough."""

import logging
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from retinanet.data.pixels import Deferred, PixelRange, RawImage
from retinanet.data.report import FileError

if TYPE_CHECKING:
    from tifffile import TiffPage

CACHE = 2**27  # bytes of decoded segments that are kept; a row of tiles of a wide image has fewer
DEFLATE = (8, 32946)
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Values of TIFF's tags.
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
ASSOCIATED_ALPHA = 1
ORIENTATION = 274
REDUCED, MASK = 1, 4


class Pixels:
    """The first image of a TIFF file, of which only those strips or tiles are decoded that a slice touches."""

    def __init__(self, path: str | Path, page: "TiffPage"):
        self.path = path
        self.dtype = page.dtype
        self.stored = page.dtype.newbyteorder(page.parent.byteorder)
        planes, _, height, width, samples = page.shaped
        self.shape = (height, width, planes * samples)
        self.separate, self.samples = planes > 1, samples
        rows = page.rowsperstrip or height
        self.segment = (page.tilelength, page.tilewidth) if page.is_tiled else (min(rows, height), width)
        self.tiled, self.deflated = page.is_tiled, page.compression in DEFLATE
        self.differences = self.deflated and page.predictor == 2
        self.file_size = page.parent.filehandle.size
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        down, across = (-(-length // side) for length, side in zip((height, width), self.segment, strict=True))
        self.across, self.number = across, down * across
        if len(self.offsets) < planes * self.number or len(self.counts) < planes * self.number:
            raise ValueError("it lists fewer strips or tiles than its size needs")
        self._cache: dict[int, np.ndarray] = {}

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        """[h, w, C], of many bands the first three; a FileError where the file is damaged."""
        try:
            return self._read(window)
        except (OSError, ValueError, MemoryError, zlib.error) as error:
            raise FileError(str(self.path), f"cannot be read as an image ({error})") from error

    def _read(self, window: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (
            part.indices(length) for part, length in zip(window, self.shape, strict=False)
        )
        (height, width), bands = self.segment, min(self.shape[2], 3)
        found = np.empty((max(0, bottom - top), max(0, right - left), bands), dtype=self.dtype)
        with open(self.path, "rb") as file:
            for plane in range(bands if self.separate else 1):
                into = found[:, :, plane : plane + 1] if self.separate else found
                for y in range(top // height * height, bottom, height):
                    for x in range(left // width * width, right, width):
                        index = plane * self.number + y // height * self.across + x // width
                        rows = max(top, y), min(bottom, y + height)
                        columns = max(left, x), min(right, x + width)
                        part = self._rows(file, index, rows[0] - y, rows[1] - y)
                        part = part[:, columns[0] - x : columns[1] - x, : into.shape[2]]
                        into[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left] = part
        return found

    def _rows(self, file: BinaryIO, index: int, start: int, stop: int) -> np.ndarray:
        """Some rows of a segment [stop - start, segment's width, samples]; compressed segments are kept for others."""
        height, width = self.segment
        row = width * self.samples * self.dtype.itemsize
        if not self.tiled:  # the last strip is shorter
            height = min(height, self.shape[0] - index % self.number * height)
        if not self.counts[index]:  # left out, because nothing is in it
            return np.zeros((stop - start, width, self.samples), dtype=self.dtype)
        if not self.deflated:
            if self.offsets[index] + stop * row > self.file_size:
                raise ValueError("image file is truncated")
            shape = stop - start, width, self.samples  # not read: the slice may be narrow
            return np.memmap(file, self.stored, "r", self.offsets[index] + start * row, shape)
        if index not in self._cache:
            file.seek(self.offsets[index])
            data = file.read(self.counts[index])
            segment = self._decode(zlib.decompressobj().decompress(data, height * row), height)
            while self._cache and len(self._cache) * segment.nbytes > CACHE:
                del self._cache[next(iter(self._cache))]
            self._cache[index] = segment
        return self._cache[index][start:stop]

    def _decode(self, data: bytes, rows: int) -> np.ndarray:
        shape = rows, self.segment[1], self.samples
        if len(data) < math.prod(shape) * self.dtype.itemsize:
            raise ValueError("image file is truncated")
        values = np.frombuffer(data, self.stored, math.prod(shape)).reshape(shape).astype(self.dtype, copy=False)
        return np.cumsum(values, axis=1, dtype=self.dtype) if self.differences else values


@contextmanager
def _first_page(path: str | Path) -> "Iterator[TiffPage]":
    from tifffile import TiffFile, TiffFileError  # takes a tenth of a second, which few need

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it warns of is read, or an error of its own
    try:
        with TiffFile(path) as file:
            if not len(file.pages):
                raise ValueError("it holds no image")
            page = file.pages.first
            if page.dtype is None or page.dtype.kind not in "buif" or not math.prod(page.shaped) or page.shaped[1] != 1:
                raise ValueError(
                    f"it has the shape {page.shape} and {page.bitspersample} bits a number of kind {page.dtype}"
                )
            yield page
    except TiffFileError as error:
        raise ValueError(str(error)) from error


def has_more_pages(path: str | Path) -> bool:
    """Whether a file is a TIFF file with images beside the first one, other than smaller copies and masks of it."""
    with open(path, "rb") as file:
        if file.read(4) not in TIFF_STARTS:
            return False
    with _first_page(path) as page:
        pages = page.parent.pages
        return any(not pages[number].subfiletype & (REDUCED | MASK) for number in range(1, min(len(pages), 16)))


def open_tiff(path: str | Path, by_pillow: Deferred | None) -> RawImage | None:
    """Open a TIFF file's first image.

    Args:
        path: the file.
        by_pillow: what Pillow makes of it, for compressions that need a library; it is turned upright.

    Returns:
        The image; None for colours other than RGB and grey, which are Pillow's part.

    Raises:
        ValueError: the file is damaged; or what tifffile raises for it.
    """
    with _first_page(path) as page:
        if page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
            return None
        orientation = page.tags.valueof(ORIENTATION, 1)
        plain = page.compression in (1, *DEFLATE) and page.predictor in (1, 2) and page.fillorder == 1
        plain &= page.bitspersample == 8 * page.dtype.itemsize and (page.predictor == 1 or page.dtype.kind in "ui")
        if plain:
            values = Pixels(path, page)
        elif by_pillow is not None:
            values, orientation = by_pillow, 1
        else:
            planes, _, height, width, samples = page.shaped
            values = Deferred((height, width, planes * samples), page.dtype, lambda: _decode_all(path))
        premultiplied = ASSOCIATED_ALPHA in page.extrasamples
        return RawImage(
            values, *_declarations(page), page.photometric == WHITE_IS_ZERO, orientation, plain and not premultiplied
        )


def _decode_all(path: str | Path) -> np.ndarray:
    """[H, W, C] by tifffile, which takes imagecodecs for some compressions."""
    with _first_page(path) as page:
        planes = page.asarray().reshape(page.shaped)[:, 0]  # [planes, H, W, samples]
    return np.concatenate(planes, axis=2)


def _declarations(page: "TiffPage") -> tuple[PixelRange | None, float | None]:
    """The range that a file declares, unless it is that of its data type; and its value for missing pixels."""

    def number(tags: Sequence[int], choose: Callable) -> float | None:
        found = (page.tags.valueof(tag) for tag in tags)
        return next((float(choose(np.ravel(value))) for value in found if value is not None), None)

    low, high = number((340, 280), min), number((341, 281), max)  # SMinSampleValue, MinSampleValue, ...
    try:
        nodata = float(page.tags.valueof(42113, ""))  # GDAL_NODATA
    except ValueError:
        nodata = None
    full = 2.0**page.bitspersample - 1
    if high is None and page.dtype.kind == "u" and page.bitspersample < 8 * page.dtype.itemsize:
        high = full
    low = 0.0 if low is None and page.dtype.kind == "u" else low
    is_declared = low is not None and high is not None and low < high < math.inf
    is_declared &= page.bitspersample < 8 * page.dtype.itemsize or (low, high) != (0, full)
    return (low, high) if is_declared else None, nodata
