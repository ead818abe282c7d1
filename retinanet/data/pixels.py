"""From pixels of any depth to 8 bits: the range of values that becomes black to white.

8-bit pixels stay as they are. All others are scaled linearly, those of a data set that have one type (uint16, float32,
...) by one range: types differ in their units. It is what the files declare, else what their values are: from the
0.1th to the 99.9th percentile of a sample, so that a defect of the sensor does not decide.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from retinanet.errors import shown

PixelRange = tuple[float, float]  # the values that become black and white
PixelRanges = PixelRange | dict[str, PixelRange] | None  # of all types, or by the type's name; others have their own

PERCENTILES = 0.1, 99.9
SAMPLE_SIDE = 256  # pixels of each side of an image, at most, that are looked at
NODATA = (-9999, -32768)  # what geodata without a declared one have where there is no measurement
HUGE = 1e30  # so do some floating-point files with the largest numbers that there are
VISIBLE = 1 / 32  # a declared range of which the values take up less would leave a black or a white image
DARK = 16  # of 255: an image whose pixels are all darker is nearly black
STRIP = 2**22  # pixels that are scaled at once


def checked_range(values: Any) -> PixelRanges:
    """Two rising numbers, or a dict of them by type; or a ValueError."""
    if isinstance(values, dict):
        return {np.dtype(name).name: checked_range(pair) for name, pair in values.items()}
    with contextlib.suppress(TypeError, ValueError):
        low, high = map(float, values)
        if -HUGE <= low < high <= HUGE:
            return low, high
    raise ValueError(f"a pixel range must be two numbers, of which the second is larger, not {shown(values)}")


def range_of(ranges: PixelRanges, dtype: np.dtype) -> PixelRange | None:
    """The range for a type; None: there is none."""
    return ranges.get(dtype.name) if isinstance(ranges, dict) else ranges


class Sample(NamedTuple):
    """What is looked at of an image to choose a range."""

    values: np.ndarray  # [N] float64, finite
    declared: PixelRange | None  # by the file, unless that says no more than its data type does


def percentile_range(values: np.ndarray) -> PixelRange:
    """The range of values [N], some of which are left out; never an empty one."""
    low, high = np.percentile(values, PERCENTILES) if len(values) else (0.0, 0.0)
    if low == high and len(values):  # nearly all are background
        low, high = values.min(), values.max()
    if low == high:
        low, high = low - max(1, abs(low)), high + max(1, abs(high))
    return float(low), float(high)


def pooled_range(samples: Iterable[Sample]) -> PixelRange:
    """The one range of several images: the union of those that all of them declare, else that of their values."""
    samples = list(samples)
    low, high = percentile_range(np.concatenate([sample.values for sample in samples]))
    declared = [sample.declared for sample in samples if sample.declared]
    if len(declared) == len(samples):
        black, white = min(lows for lows, _ in declared), max(highs for _, highs in declared)
        seen = min(high, white) - max(low, black)
        if seen >= VISIBLE * (white - black) and seen >= (high - low) / 2:
            return float(black), float(white)
    return low, high


def is_hidden(sample: Sample, pixel_range: PixelRange) -> bool:
    """Whether an image is nearly black or nearly white in a range, unless it is of one colour."""
    if not len(sample.values) or sample.values.min() == sample.values.max():
        return False
    darkest, brightest = to_bytes(np.array(percentile_range(sample.values)), pixel_range)
    return brightest < DARK or darkest > 255 - DARK


def to_bytes(values: np.ndarray, pixel_range: PixelRange, nodata: float | None = None) -> np.ndarray:
    """Scale numbers of any type to uint8, black to white; NaN and `nodata` become black, uint8 stays as it is."""
    if values.dtype in (np.uint8, np.bool_):
        return values if values.dtype == np.uint8 else values * np.uint8(255)
    low, high = pixel_range
    with np.errstate(all="ignore"):  # infinite ones are clipped
        scaled = values.astype(np.result_type(values.dtype, np.float32))
        scaled -= low
        scaled *= 255 / (high - low)
        np.rint(scaled.clip(0, 255, out=scaled), out=scaled)
        scaled[np.isnan(scaled) if nodata is None else np.isnan(scaled) | (values == nodata)] = 0
    return scaled.astype(np.uint8)


def to_three_bands(image: np.ndarray) -> np.ndarray:
    """[H, W] or [H, W, C] -> [H, W, 3]: one or two bands become grey, from more the first three are taken."""
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
        return self.decode()

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        return self._values[window]


@dataclass
class RawImage:
    """An image as its file has it, of more than 8 bits or of many bands; sliced, it gives [h, w, 3] uint8 RGB."""

    values: Any  # [H, W] or [H, W, C] of any real type; sliced by rows and columns, gives such an array
    declared: PixelRange | None = None  # by the file
    nodata: float | None = None  # the value of pixels that were not measured
    inverted: bool = False  # whether the largest value is black
    orientation: int = 1  # of EXIF; sliced, the image is not turned
    by_parts: bool = False  # whether a slice costs no more than its share of the image
    ranges: PixelRanges = None  # None: its own

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the RGB image."""
        return (*self.values.shape[:2], 3)

    @property
    def is_deep(self) -> bool:
        """Whether it has more than 8 bits."""
        return self.values.dtype not in (np.uint8, np.bool_)

    @functools.cached_property
    def _range(self) -> PixelRange:
        return range_of(self.ranges, self.values.dtype) or pooled_range([self.sample()])

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        grey = to_bytes(to_three_bands(self.values[window]), self._range if self.is_deep else (0, 255), self.nodata)
        return 255 - grey if self.inverted else grey

    def decode(self, ranges: PixelRanges = None) -> np.ndarray:
        """All of it, [H, W, 3]."""
        self.ranges = ranges
        image, step = np.empty(self.shape, dtype=np.uint8), max(1, STRIP // self.shape[1])
        for top in range(0, len(image), step):
            image[top : top + step] = self[top : top + step, :]
        return image

    def sample(self) -> Sample:
        """Some of its values: all windows of a grid, or a grid of all pixels."""
        height, width = self.shape[:2]
        if height * width <= STRIP:
            step, parts = -(-min(height, width) // SAMPLE_SIDE), [self.values[:, :]]
        else:
            tops, lefts = (np.linspace(0, max(0, length - 128), 8).astype(int) for length in (height, width))
            step, parts = 4, [self.values[top : top + 128, left : left + 128] for top in tops for left in lefts]
        values = np.concatenate([to_three_bands(part)[::step, ::step].ravel() for part in parts])
        values = values[np.isfinite(values)].astype(np.float64)
        with np.errstate(over="ignore"):
            missing = NODATA if self.nodata is None else (self.nodata, np.float32(self.nodata))  # as rounded in files
        values = values[~np.isin(values, missing)]
        return Sample(values[np.abs(values) < HUGE], self.declared)
