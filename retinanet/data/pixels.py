"""From pixels of any depth to 8 bits: which values become black and white.

8-bit pixels stay as they are. All others are scaled linearly, with one range for all images of a type (uint16, float32,
...) in a data set, because types differ in their units. The range is what the files declare, or else that of their
values: from the 0.1th to the 99.9th percentile of a sample, so that defects of the sensor do not matter.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retinanet.errors import shown

PixelRange = tuple[float, float]  # the values that become black and white
PixelRanges = PixelRange | dict[str, PixelRange] | None  # one for all types, or by type; other types have their own

PERCENTILES = 0.1, 99.9
SAMPLE_SIDE = 256  # pixels that are sampled along an image's shorter side, at most
NODATA = (-9999, -32768)  # usual values of missing pixels in geodata that declare none
HUGE = 1e30  # larger numbers, such as the largest float, mark missing pixels in some floating-point files
VISIBLE = 1 / 32  # if the values fill a smaller share of a declared range, the image would be black or white
DARK = 16  # of 255: an image whose pixels are all darker is nearly black
STRIP = 2**22  # pixels that are scaled at once


def checked_range(values: Any) -> PixelRanges:
    """A valid range: two increasing numbers, or a dict of them by type; a ValueError for anything else."""
    if isinstance(values, dict):
        return {np.dtype(name).name: checked_range(pair) for name, pair in values.items()}
    with contextlib.suppress(TypeError, ValueError):
        low, high = map(float, values)
        if -HUGE <= low < high <= HUGE:
            return low, high
    raise ValueError(f"a pixel range must be two numbers, the second one larger, not {shown(values)}")


def range_of(ranges: PixelRanges, dtype: np.dtype) -> PixelRange | None:
    """The range for a type; None if there is none."""
    return ranges.get(dtype.name) if isinstance(ranges, dict) else ranges


def percentile_range(values: np.ndarray) -> PixelRange:
    """The range of values [N] between PERCENTILES; never an empty one."""
    low, high = np.percentile(values, PERCENTILES) if len(values) else (0.0, 0.0)
    if low == high and len(values):  # nearly all are background
        low, high = values.min(), values.max()
    if low == high:
        low, high = low - max(1, abs(low)), high + max(1, abs(high))
    return float(low), float(high)


def pooled_range(samples: Sequence[np.ndarray], declared: Sequence[PixelRange | None]) -> PixelRange:
    """One range for several images: the union of what they all declare, if it fits, else that of their values.

    `samples` and `declared` are `RawImage.sample()` and `RawImage.declared` of each image.
    """
    low, high = percentile_range(np.concatenate(samples))
    if all(declared):
        black, white = min(lows for lows, _ in declared), max(highs for _, highs in declared)
        seen = min(high, white) - max(low, black)
        if seen >= VISIBLE * (white - black) and seen >= (high - low) / 2:
            return float(black), float(white)
    return low, high


def is_hidden(sample: np.ndarray, pixel_range: PixelRange) -> bool:
    """Whether a range makes an image nearly black or nearly white; False for images of one colour."""
    if not len(sample) or sample.min() == sample.max():
        return False
    darkest, brightest = to_bytes(np.array(percentile_range(sample)), pixel_range)
    return brightest < DARK or darkest > 255 - DARK


def to_bytes(values: np.ndarray, pixel_range: PixelRange, nodata: float | None = None) -> np.ndarray:
    """Scale numbers of any type to uint8; NaN and `nodata` become black, and uint8 stays as it is."""
    if values.dtype in (np.uint8, np.bool_):
        return values if values.dtype == np.uint8 else values * np.uint8(255)
    low, high = pixel_range
    with np.errstate(all="ignore"):  # infinity is clipped
        scaled = values.astype(np.result_type(values.dtype, np.float32))
        scaled -= low
        scaled *= 255 / (high - low)
        np.rint(scaled.clip(0, 255, out=scaled), out=scaled)
        scaled[np.isnan(scaled) if nodata is None else np.isnan(scaled) | (values == nodata)] = 0
    return scaled.astype(np.uint8)


def to_three_bands(image: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] -> [H, W, 3]: one or two bands become grey; of more bands, the first three are used."""
    image = np.atleast_3d(image)
    return np.ascontiguousarray(image[:, :, :3] if image.shape[2] >= 3 else image[:, :, [0, 0, 0]])


@dataclass
class Deferred:
    """An array [H, W, C] that is decoded when it is first sliced."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    decode: Callable[[], np.ndarray]

    @functools.cached_property
    def _values(self) -> np.ndarray:
        return self.decode().astype(self.dtype, copy=False)

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        return self._values[window]


@dataclass
class RawImage:
    """An image of more than 8 bits or of many bands, as its file stores it; slices are [h, w, 3] uint8 RGB."""

    values: Any  # [H, W] or [H, W, C] of any real type, or an object that gives such arrays when sliced
    declared: PixelRange | None = None  # by the file, unless it is the full range of the data type
    nodata: float | None = None  # the value of missing pixels
    inverted: bool = False  # whether the largest value is black
    orientation: int = 1  # EXIF's
    is_upright: bool = False  # whether the values are turned by it already
    by_parts: bool = False  # whether a slice costs no more than its share of the image
    ranges: PixelRanges = None  # None: the image's own range

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        """[H, W, 3], the shape of the RGB image."""
        return (*self.values.shape[:2], 3)

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits."""
        return self.values.dtype not in (np.uint8, np.bool_)

    @functools.cached_property
    def _range(self) -> PixelRange:
        return range_of(self.ranges, self.values.dtype) or pooled_range([self.sample()], [self.declared])

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        grey = to_bytes(to_three_bands(self.values[window]), self._range if self.is_deep else (0, 255), self.nodata)
        return 255 - grey if self.inverted else grey

    def decode(self, ranges: PixelRanges = None) -> np.ndarray:
        """The whole image, [H, W, 3] uint8 RGB."""
        self.ranges = ranges
        image, step = np.empty(self.shape, dtype=np.uint8), max(1, STRIP // self.shape[1])
        for top in range(0, len(image), step):
            image[top : top + step] = self[top : top + step, :]
        return image

    def sample(self) -> np.ndarray:
        """Some of its values, [N] float64, finite: every n-th pixel, in large images only within a grid of windows."""
        height, width = self.shape[:2]
        if height * width <= STRIP:
            step, parts = -(-min(height, width) // SAMPLE_SIDE), [self.values[:, :]]
        else:
            tops, lefts = (np.linspace(0, max(0, length - 128), 8).astype(int) for length in (height, width))
            step, parts = 4, [self.values[top : top + 128, left : left + 128] for top in tops for left in lefts]
        values = np.concatenate([to_three_bands(part)[::step, ::step].ravel() for part in parts])
        values = values[np.isfinite(values)].astype(np.float64)
        with np.errstate(over="ignore"):
            missing = NODATA if self.nodata is None else (self.nodata, np.float32(self.nodata))  # files may round it
        values = values[~np.isin(values, missing)]
        return values[np.abs(values) < HUGE]
