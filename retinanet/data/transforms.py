"""Transforms, sample -> sample, that run between the file and the network.

A transform keeps the dtype that it gets, and never changes its input in place. Random transforms draw from NumPy's
global generator, which `loader.read_sample` seeds. Images are [H, W, 3]; torchvision's functions get [3, H, W].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image

from retinanet.data.samples import SampleError, clip_to_image, crop_boxes, sample_parts

# ImageNet's mean and standard deviation of RGB, for pixels from 0 to 1.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

CROP_TRIES = 10  # draws of RandomCrop
MIN_REST = 0.1  # LargeScaleJitter keeps a box if at least this share of its area is left
SIZE_DIVISOR = 32  # the stride of C5; at multiples of it, C3 and C4 are exactly 4 and 2 times as large as C5


def normalize(images: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 -> float32 of zero mean and unit variance, channels_last, on the same device.

    Floating-point images count as normalised already, and are only converted to float32.
    """
    if images.is_floating_point():
        return images.float()
    normal = images.to(torch.float32, memory_format=torch.channels_last)
    # Channel by channel with plain numbers, because a tensor of three would have to be copied to the GPU first.
    for channel, mean, std in zip(normal.unbind(dim=1), PIXEL_MEAN, PIXEL_STD, strict=True):
        channel.mul_(1 / (255 * std)).sub_(mean / std)
    return normal


def pad_value(dtype: torch.dtype) -> Tensor:
    """The colour [3] that pads images of a dtype: the mean colour, which becomes 0 when normalised."""
    if dtype == torch.uint8:
        return (torch.tensor(PIXEL_MEAN) * 255).round().to(torch.uint8)
    return torch.zeros(3, dtype=dtype)


def pad_images(images: Sequence[Tensor], height: int, width: int) -> Tensor:
    """[3, H, W] each -> [B, 3, height, width] in their dtype, channels_last, padded at the right and bottom."""
    batch = images[0].new_empty(len(images), height, 3 * width)  # in this layout, rows are copied much faster
    padding = pad_value(batch.dtype).repeat(width)
    for canvas, image in zip(batch, images, strict=True):
        bottom, right = image.shape[1], 3 * image.shape[2]
        canvas[:bottom, :right] = image.permute(1, 2, 0).reshape(bottom, right)
        canvas[:bottom, right:] = padding[right:]
        canvas[bottom:] = padding
    return batch.view(len(images), height, width, 3).permute(0, 3, 1, 2)


@dataclass
class V2:
    """Lets a transform of torchvision.transforms.v2, such as a Compose, take samples; boxes move with the pixels.

    Boxes are then clipped to the image, and dropped if less than a pixel is left.
    """

    transform: Callable[[dict], dict]

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] and `annot` [G, 5]."""
        image, annotations = sample_parts(sample)
        pixels, annotations = torch.from_numpy(image.copy()).permute(2, 0, 1), torch.from_numpy(annotations.copy())
        boxes = BoundingBoxes(annotations[:, :4], format=BoundingBoxFormat.XYXY, canvas_size=image.shape[:2])
        out = self.transform({"image": Image(pixels), "boxes": boxes, "labels": annotations[:, 4]})
        boxes = tv.convert_bounding_box_format(out["boxes"], new_format=BoundingBoxFormat.XYXY).as_subclass(Tensor)
        annotations = torch.cat([boxes, out["labels"][:, None].to(boxes.dtype)], dim=1).numpy()
        annotations += 0  # torchvision's flips leave negative zeros
        image = tv.to_image(out["image"]).permute(1, 2, 0).numpy()
        return {**sample, "img": image, "annot": clip_to_image(annotations, *image.shape[:2])}


class Normalizer:
    """Pixels -> float32, normalised by ImageNet's mean and variance. uint8 is taken as 0-255, float as 0-1."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3]."""
        image, _ = sample_parts(sample)
        image = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
        return {**sample, "img": (image - np.float32(PIXEL_MEAN)) / np.float32(PIXEL_STD)}


class UnNormalizer:
    """The inverse of Normalizer, to look at images: [..., 3, H, W] normalised -> the same shape, 0-1."""

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.mean = PIXEL_MEAN if mean is None else mean
        self.std = PIXEL_STD if std is None else std

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the pixels from 0 to 1."""
        mean, std = (tensor.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return tensor * std + mean


FLIPS = {"none": "", "horizontal": "x", "vertical": "y", "both": "xy"}  # name -> directions


class Augmenter:
    """Mirrors samples half of the time, by default left to right (RetinaNet, section 4.1, "Optimization").

    `flip` is one of FLIPS; `both` draws the two directions independently. `rotate90` also turns samples by 0, 90, 180
    or 270 degrees with equal probability.
    """

    def __init__(self, flip: str = "horizontal", rotate90: bool = False):
        if flip not in FLIPS:
            raise ValueError(f"flip must be one of {', '.join(FLIPS)}, not {flip!r}")
        self.flips = FLIPS[flip]
        self.rotate90 = rotate90

    def __call__(self, sample: dict[str, Any], flip_x: float = 0.5) -> dict[str, Any]:
        """Mirror with probability `flip_x` in each direction."""
        x, y = (direction in self.flips and np.random.rand() < flip_x for direction in "xy")
        quarters = np.random.randint(4) if self.rotate90 else 0
        if not (x or y or quarters):
            return sample
        # Not by torchvision's functions, which take several times as long, and turn boxes by inexact sines.
        image, annotations = sample_parts(sample)
        image, annotations = torch.from_numpy(np.require(image, requirements="CW")), annotations.copy()
        if quarters % 2:  # a quarter anticlockwise is a transposition, then a flip in y
            image, annotations, x, y = image.transpose(0, 1), annotations[:, [1, 0, 3, 2, 4]], y, x
        x, y = x != (quarters >= 2), y != (quarters in (1, 2))
        height, width, _ = image.shape
        if x:
            annotations[:, [0, 2]] = width - annotations[:, [2, 0]]
        if y:
            annotations[:, [1, 3]] = height - annotations[:, [3, 1]]
        image = image.flip([axis for axis, flipped in enumerate((y, x)) if flipped])
        return {**sample, "img": image.numpy(), "annot": annotations}


@dataclass
class ColourJitter:
    """Scales brightness, contrast and saturation at random, each by 1 - strength to 1 + strength.

    The hue is shifted by up to a tenth of `strength`, in turns of the colour wheel.
    """

    strength: float

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] uint8."""
        image, _ = sample_parts(sample)
        if image.dtype != np.uint8:
            raise SampleError("img must be uint8 for ColourJitter: put it before Normalizer")
        image = torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)
        for adjust in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation):
            image = adjust(image, np.random.uniform(max(0, 1 - self.strength), 1 + self.strength))
        image = tv.adjust_hue(image, np.random.uniform(-self.strength / 10, self.strength / 10))
        return {**sample, "img": image.permute(1, 2, 0).numpy()}


@dataclass
class RandomCrop:
    """Crops an image to a random part with at least `min_share` of each side.

    Boxes are clipped to it, and dropped if their centre is outside. If a part would lose all boxes, it is drawn again,
    at most CROP_TRIES times; then the sample stays as it is.
    """

    min_share: float

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] and `annot` [G, 5]."""
        image, annotations = sample_parts(sample)
        size = np.array([image.shape[1], image.shape[0]])  # width, height
        centres = (annotations[:, :2] + annotations[:, 2:4]) / 2
        for _ in range(CROP_TRIES):
            cut = np.maximum(1, np.round(size * np.random.uniform(self.min_share, 1, 2))).astype(int)
            start = np.array([np.random.randint(0, rest + 1) for rest in size - cut])
            inside = ((centres >= start) & (centres < start + cut)).all(axis=1)
            if inside.any() or not len(annotations):
                (x, y), (right, bottom) = start, start + cut
                annotations = crop_boxes(annotations[inside], start, cut)
                return {**sample, "img": image[y:bottom, x:right].copy(), "annot": annotations}
        return sample


def resized_size(
    height: int, width: int, min_side: float | None, max_side: float | None, enlarge: bool = True
) -> tuple[float, tuple[int, int], tuple[int, int]]:
    """How Resizer scales and pads an image; without `min_side` and `max_side` the scale is 1.

    Returns:
        The scale (resized size / original size), and height and width after resizing and after padding.
    """
    limits = (min_side, min(height, width)), (max_side, max(height, width))
    scale = min((wanted / side for wanted, side in limits if wanted), default=1.0)
    scale = scale if enlarge else min(scale, 1.0)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return scale, size, (padded_side(size[0]), padded_side(size[1]))


def padded_side(side: int) -> int:
    """The next multiple of 32."""
    # Paper: silent. Original: adds 32 px even to multiples of 32. Here: adds nothing to them, because none is needed.
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR


def _resize(
    sample: dict[str, Any], scale: float, size: tuple[int, int], canvas: tuple[int, int], boxes_by: Any
) -> dict[str, Any]:
    """Resize a sample to `size` and pad it to `canvas`; boxes are multiplied by `boxes_by`, one number or four."""
    image, annotations = sample_parts(sample)
    # torch resizes channels_last bytes without copying them, which takes two thirds of the time.
    image = torch.from_numpy(np.require(image, requirements="CW"))[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
    resized = F.interpolate(image, size, mode="bilinear", antialias=True)
    padded = pad_images(resized, *canvas)[0].permute(1, 2, 0)  # [H, W, 3]
    annotations = annotations.astype(np.float32)
    annotations[:, :4] *= np.float32(boxes_by)
    return {**sample, "img": padded, "annot": torch.from_numpy(annotations), "scale": scale, "size": size}


@dataclass
class Resizer:
    """Scales the short side to `min_side`, unless the long side would exceed `max_side`; pads to multiples of 32.

    Args:
        min_side: pixels; if two numbers, drawn from this range for each sample (scale jitter; RetinaNet, section 5.2).
        max_side: pixels.
        enlarge: False leaves smaller images as they are.
    """

    # Paper: 600 to 800 / 1333 pixels. Original: 608 / 1024, in float64. Here: the original's sizes, antialiased
    # in uint8, because that is many times faster and looks the same.
    min_side: int | Sequence[int] = 608
    max_side: int = 1024
    enlarge: bool = True

    def __call__(
        self, sample: dict[str, Any], min_side: int | None = None, max_side: int | None = None
    ) -> dict[str, Any]:
        """Adds `scale` (resized size / original size) and `size` (height and width before padding)."""
        height, width, _ = sample_parts(sample)[0].shape
        min_side, max_side = min_side or self.min_side, max_side or self.max_side
        if isinstance(min_side, Sequence):
            min_side = int(np.random.randint(min_side[0], min_side[1] + 1))
        scale, size, canvas = resized_size(height, width, min_side, max_side, self.enlarge)
        return _resize(sample, scale, size, canvas, scale)


@dataclass
class LargeScaleJitter:
    """Resizes by a random factor, then crops or pads to a square canvas (Ghiasi et al., "Copy-Paste", 2021, 3.1).

    The factor, from `low` to `high`, is relative to the size that Resizer gives an image, the size for detection. The
    side of the canvas is `max_side`, rounded up to a multiple of 32. Boxes are clipped to the crop, and dropped if less
    than MIN_REST of their area, or less than a pixel, is left.
    """

    low: float
    high: float
    min_side: int = 608
    max_side: int = 1024

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Adds `scale` and `size`, as Resizer does."""
        image, annotations = sample_parts(sample)
        size, canvas = np.array(image.shape[:2]), padded_side(self.max_side)
        scale, *_ = resized_size(*size.tolist(), self.min_side, self.max_side)
        scale *= np.random.uniform(self.low, self.high)
        # Cropped before it is resized, so that memory does not grow with the factor.
        cut = np.clip(int(canvas / scale), 1, size)
        start = np.array([np.random.randint(0, rest + 1) for rest in size - cut])
        (y, x), (bottom, right) = start, start + cut
        annotations = crop_boxes(annotations.astype(np.float32), start[::-1], cut[::-1], MIN_REST)
        resized = np.clip(np.round(cut * scale), 1, canvas).astype(int)
        boxes_by = np.tile(resized[::-1] / cut[::-1], 2)  # x, y, x, y: `scale`, except for rounding
        sample = {**sample, "img": image[y:bottom, x:right], "annot": annotations}
        sample = _resize(sample, scale, tuple(resized.tolist()), (canvas, canvas), boxes_by)
        return {**sample, "annot": torch.from_numpy(clip_to_image(sample["annot"].numpy(), *sample["size"]))}
