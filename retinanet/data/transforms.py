"""What happens to a sample between its file and the network: sample -> sample.

A transform keeps the dtype that it gets, and never changes its input in place. Random ones draw from NumPy's
global generator, which `loader.read_sample` seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from torchvision.tv_tensors import BoundingBoxes, Image, wrap

from retinanet.data.report import MIN_SIDE
from retinanet.errors import UserError, shown

# ImageNet's mean and standard deviation of RGB, for pixels from 0 to 1.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

MAX_NORMALISED = 100.0  # no normalised pixel is that far from 0: such an image holds 0 to 255

SIZE_DIVISOR = 32  # the stride of C5: padded to it, every level of the pyramid doubles the next one exactly


def normalize(images: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 -> float32 of zero mean and unit variance, channels_last, on the same device.

    Floating-point images count as normalised, and only become float32.
    """
    if images.is_floating_point():
        return images.float()
    normal = images.to(torch.float32, memory_format=torch.channels_last)
    # Channel by channel with plain numbers: a tensor of three would first have to be copied to the GPU.
    for channel, mean, std in zip(normal.unbind(dim=1), PIXEL_MEAN, PIXEL_STD, strict=True):
        channel.mul_(1 / (255 * std)).sub_(mean / std)
    return normal


def pad_value(dtype: torch.dtype) -> Tensor:
    """The colour [3] that pads images of a dtype: the mean colour, which is 0 once normalised."""
    if dtype == torch.uint8:
        return (torch.tensor(PIXEL_MEAN) * 255).round().to(torch.uint8)
    return torch.zeros(3, dtype=dtype)


def pad_images(images: Sequence[Tensor], height: int, width: int) -> Tensor:
    """[3, H, W] each -> [B, 3, height, width] in their dtype, channels_last, padded at the right and below."""
    batch = images[0].new_empty(len(images), height, width, 3)
    row = pad_value(batch.dtype).repeat(width).view(width, 3)  # copied whole: single pixels would take 50 times as long
    for canvas, image in zip(batch, images, strict=True):
        bottom, right = image.shape[1:]
        canvas[:bottom, :right] = image.permute(1, 2, 0)
        canvas[:bottom, right:] = row[right:]
        canvas[bottom:] = row
    return batch.permute(0, 3, 1, 2)


class SampleError(UserError):
    """What a transform got, or returned, is not a sample; the data set adds which image and transform."""


def sample_parts(sample: Any) -> tuple[np.ndarray, np.ndarray]:
    """The image [H, W, 3] and the annotations [G, 5] of a sample, as arrays that may share its memory.

    Raises:
        SampleError: they are missing, or of another shape or dtype.
    """
    if not isinstance(sample, Mapping) or not sample.keys() >= {"img", "annot"}:
        found = f"one with the keys {shown(list(sample))}" if isinstance(sample, Mapping) else shown(sample)
        raise SampleError(f"a sample is a dict with the keys img and annot, not {found}")
    try:
        image, annotations = np.asarray(sample["img"]), np.asarray(sample["annot"])
    except (TypeError, ValueError, RuntimeError) as error:  # such as tensors on a GPU, lists of unequal length
        raise SampleError(f"img and annot must be arrays: {error}") from error
    known = image.dtype == np.uint8 or image.dtype.kind == "f"
    if not known or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise SampleError(f"img must be [H, W, 3], uint8 or normalised floats, not {image.dtype} {list(image.shape)}")
    if annotations.ndim != 2 or annotations.shape[1] != 5 or annotations.dtype.kind not in "fi":
        found = f"{annotations.dtype} {list(annotations.shape)}"
        raise SampleError(f"annot must be numbers [G, 5] (x1, y1, x2, y2, label), without boxes [0, 5], not {found}")
    return image, annotations


def check_sample(sample: Any, num_classes: int) -> dict[str, Any]:
    """The sample that a transform returned, its image and annotations as tensors, or as arrays that torch can read.

    Raises:
        SampleError: it is not a sample, or its boxes, labels or pixels cannot be right.
    """
    image, annotations = sample_parts(sample)
    boxes, labels, (height, width) = annotations[:, :4], annotations[:, 4], image.shape[:2]
    outside = (boxes < -1) | (boxes > [width + 1, height + 1] * 2)  # Resizer rounds the image's size, not the boxes
    for problem, rows in (
        ("a number that is not finite", ~np.isfinite(annotations).all(axis=1)),
        ("a box without x1 < x2 and y1 < y2", (boxes[:, :2] >= boxes[:, 2:]).any(axis=1)),
        (f"a box beyond the image, {height} x {width}", outside.any(axis=1)),
        (f"a label that is not one of 0 to {num_classes - 1}", ~np.isin(labels, np.arange(num_classes))),
    ):
        if rows.any():
            raise SampleError(f"annot holds {problem}: {shown(annotations[rows.argmax()].tolist())}")
    if image.dtype.kind == "f" and not -MAX_NORMALISED < image.min() <= image.max() < MAX_NORMALISED:
        raise SampleError("img holds floats far from 0: keep pixels of 0 to 255 as uint8, or use Normalizer")
    arrays = {
        key: np.require(part, requirements="CW")
        for key, part in (("img", image), ("annot", annotations))
        if not torch.is_tensor(sample[key])
    }
    return {**sample, **arrays}


def clip_to_image(annotations: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip boxes [G, 5] to the image, in place; those of which less than a pixel is left are dropped."""
    annotations[:, :4] = annotations[:, :4].clip(0, [width, height, width, height])
    return annotations[(annotations[:, 2:4] - annotations[:, :2] >= MIN_SIDE).all(axis=1)]


def _to_tv(sample: dict[str, Any]) -> tuple[Image, BoundingBoxes, Tensor]:
    """A sample's image [3, H, W], boxes [G, 4] and labels [G], as torchvision's transforms take them."""
    image, annotations = sample_parts(sample)
    image = torch.from_numpy(np.require(image, requirements="CW")).permute(2, 0, 1)
    annotations = torch.from_numpy(annotations.copy())
    boxes = BoundingBoxes(annotations[:, :4], format="XYXY", canvas_size=image.shape[1:])
    return Image(image), boxes, annotations[:, 4]


def _from_tv(sample: dict[str, Any], image: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Any]:
    """The sample with what torchvision made of the three."""
    annotations = torch.cat([boxes, labels[:, None].to(boxes.dtype)], dim=1).numpy()
    # torchvision's flips leave zeros of a negative sign.
    return {**sample, "img": image.permute(1, 2, 0).numpy(), "annot": annotations + 0}


def _apply(sample: dict[str, Any], *operations: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The sample after torchvision's functions, each applied to image and boxes."""
    image, boxes, labels = _to_tv(sample)
    for operation in operations:
        image, boxes = operation(image), operation(boxes)
    return _from_tv(sample, image, boxes, labels)


class V2:
    """Makes a transform of samples of one of torchvision.transforms.v2, such as a Compose: boxes move with the pixels.

    Afterwards boxes are clipped to the image; those of which less than a pixel is left are dropped.
    """

    def __init__(self, transform: Callable[[dict], dict]):
        self.transform = transform

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] and `annot` [G, 5]."""
        image, boxes, labels = _to_tv(sample)
        out = self.transform({"image": image.clone(), "boxes": boxes, "labels": labels})
        sample = _from_tv(sample, out["image"], out["boxes"], out["labels"])
        return {**sample, "annot": clip_to_image(sample["annot"], *sample["img"].shape[:2])}


class Normalizer:
    """Pixels -> float32 of zero mean and unit variance (ImageNet's). uint8 is taken as 0-255, float as 0-1."""

    def __init__(self):
        self.mean = np.array(PIXEL_MEAN, dtype=np.float32)
        self.std = np.array(PIXEL_STD, dtype=np.float32)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3]."""
        image = np.asarray(sample["img"])
        image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
        return {**sample, "img": (image - self.mean) / self.std}


class UnNormalizer:
    """The inverse of Normalizer, for images to look at: [..., 3, H, W] normalised -> the same, 0-1."""

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.mean = PIXEL_MEAN if mean is None else mean
        self.std = PIXEL_STD if std is None else std

    def __call__(self, tensor: Tensor) -> Tensor:
        """Change pixels, not their shape."""
        mean, std = (tensor.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return tensor * std + mean


FLIPS = {
    "none": (),
    "horizontal": (tv.horizontal_flip,),
    "vertical": (tv.vertical_flip,),
    "both": (tv.horizontal_flip, tv.vertical_flip),
}


def _transpose(part: Tensor) -> Tensor:
    """Exchange x and y of an image [3, H, W] or of boxes."""
    if isinstance(part, BoundingBoxes):
        return wrap(part[:, [1, 0, 3, 2]], like=part, canvas_size=part.canvas_size[::-1])
    return part.transpose(1, 2)


# By 0, 90, 180 and 270 degrees, anticlockwise. torchvision's rotate moves boxes by sines, which are not exact.
TURNS = ((), (_transpose, tv.vertical_flip), (tv.horizontal_flip, tv.vertical_flip), (_transpose, tv.horizontal_flip))


class Augmenter:
    """Mirrors samples half of the time, by default left to right (RetinaNet, section 4.1, "Optimization").

    Args:
        flip: one of FLIPS; `both` draws each of the two on its own.
        rotate90: also turn them by 0, 90, 180 or 270 degrees, each as often.
    """

    def __init__(self, flip: str = "horizontal", rotate90: bool = False):
        self.flips = FLIPS[flip]
        self.rotate90 = rotate90

    def __call__(self, sample: dict[str, Any], flip_x: float = 0.5) -> dict[str, Any]:
        """Mirror with probability `flip_x`, in either direction."""
        operations = [flip for flip in self.flips if np.random.rand() < flip_x]
        if self.rotate90:
            operations += TURNS[np.random.randint(4)]
        return _apply(sample, *operations) if operations else sample


class ColourJitter:
    """Changes brightness, contrast, saturation and hue at random.

    Args:
        strength: brightness, contrast and saturation are scaled by 1 - strength to 1 + strength; the hue is turned
            by up to a tenth of it, in turns of the colour wheel.
    """

    def __init__(self, strength: float):
        self.strength = strength

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] uint8."""
        image = torch.from_numpy(np.ascontiguousarray(sample_parts(sample)[0])).permute(2, 0, 1)  # [3, H, W]
        for adjust in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation):
            image = adjust(image, np.random.uniform(max(0, 1 - self.strength), 1 + self.strength))
        image = tv.adjust_hue(image, np.random.uniform(-self.strength / 10, self.strength / 10))
        return {**sample, "img": image.permute(1, 2, 0).numpy()}


class RandomCrop:
    """Cuts out a random part; boxes are clipped to it, or dropped where their centre is outside.

    A part without boxes is drawn again, a few times; then the sample stays whole.

    Args:
        min_share: of each side that is kept at least, from 0 to 1.
    """

    TRIES = 10

    def __init__(self, min_share: float):
        self.min_share = min_share

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] and `annot` [G, 5]."""
        image, annotations = sample_parts(sample)
        size = np.array([image.shape[1], image.shape[0]])  # width, height
        centres = (annotations[:, :2] + annotations[:, 2:4]) / 2
        for _ in range(self.TRIES):
            cut = np.maximum(1, np.round(size * np.random.uniform(self.min_share, 1, 2))).astype(int)
            start = np.array([np.random.randint(0, rest + 1) for rest in size - cut])
            inside = ((centres >= start) & (centres < start + cut)).all(axis=1)
            if inside.any() or not len(annotations):
                break
        else:
            return sample
        (left, top), (width, height) = start.tolist(), cut.tolist()
        sample = {**sample, "annot": annotations[inside]}
        return _apply(sample, lambda part: tv.crop(part, top, left, height, width).clone())


def resized_sizes(
    sizes: np.ndarray, min_side: int | None, max_side: int | None, enlarge: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How Resizer scales images of `sizes` [N, 2], height and width; without sides, as they are.

    Returns:
        Scales [N], resized size / original size; and the sizes after resizing [N, 2] and after padding [N, 2], int.
    """
    scales = np.ones(len(sizes))
    if min_side and max_side:
        scales = np.minimum(min_side / sizes.min(axis=1), max_side / sizes.max(axis=1))
    scales = scales if enlarge else scales.clip(max=1)
    resized = np.maximum(1, np.round(sizes * scales[:, None])).astype(np.int64)
    # Paper: silent. Original: pads 32 px more where the size already divides by 32. Here: pads nothing there.
    return scales, resized, -(-resized // SIZE_DIVISOR) * SIZE_DIVISOR


def _interpolate(images: Tensor, size: Sequence[int]) -> Tensor:
    """[B, 3, H, W] channels_last, which torch resizes as bytes, without copying them, many times faster."""
    return F.interpolate(images, size, mode="bilinear", antialias=True)


class Resizer:
    """Scales the short side to `min_side`, unless the long side would exceed `max_side`; pads to multiples of 32.

    Args:
        min_side: pixels.
        max_side: pixels.
        enlarge: False leaves smaller images as they are.
    """

    # Paper: 600 to 800 / 1333 pixels. Original: 608 / 1024, in float64. Here: the original's sizes, antialiased
    # on uint8, because it is many times faster and looks the same.
    def __init__(self, min_side: int = 608, max_side: int = 1024, enlarge: bool = True):
        self.min_side = min_side
        self.max_side = max_side
        self.enlarge = enlarge

    def __call__(
        self, sample: dict[str, Any], min_side: int | None = None, max_side: int | None = None
    ) -> dict[str, Any]:
        """Adds `scale` (resized size / original size) and `size` (height and width before the padding)."""
        # torch resizes channels_last bytes without copying them, in two thirds of the time.
        image, annotations = sample_parts(sample)
        image = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
        sizes = np.array([image.shape[2:]])
        sides = min_side or self.min_side, max_side or self.max_side
        scales, resized, padded = resized_sizes(sizes, *sides, self.enlarge)
        scale, size = float(scales[0]), tuple(resized[0].tolist())
        resized = _interpolate(image, size)
        canvas = pad_images(resized, *padded[0].tolist())[0].permute(1, 2, 0)  # [H, W, 3]
        annotations = torch.from_numpy(annotations.astype(np.float32))
        annotations[:, :4] *= scale
        return {**sample, "img": canvas, "annot": annotations, "scale": scale, "size": size}


class ScaleJitter:
    """Resizes each sample to a short side from `smallest` to `largest`: scale jitter (RetinaNet, section 5.2)."""

    def __init__(self, smallest: int, largest: int, max_side: int = 1024):
        self.smallest = smallest
        self.largest = largest
        self.resizer = Resizer(max_side=max_side)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Resize as Resizer does, each sample to a short side of its own."""
        return self.resizer(sample, min_side=int(np.random.randint(self.smallest, self.largest + 1)))


class LargeScaleJitter:
    """Resizes by a random factor, then crops or pads to one square canvas (Ghiasi et al., "Copy-Paste", 2021, 3.1).

    Boxes are clipped to the crop, and dropped where less than `MIN_REST` of their area, or less than a pixel, is left.

    Args:
        low: smallest factor on the size that Resizer gives an image, at which the network later detects.
        high: largest factor.
        min_side: as Resizer's. Where it equals `max_side`, factor 1 fits an image into the canvas, as in the paper.
        max_side: as Resizer's, and the side of the canvas, which is rounded up to a multiple of 32.
    """

    MIN_REST = 0.1

    def __init__(self, low: float, high: float, min_side: int = 608, max_side: int = 1024):
        self.low, self.high = low, high
        self.min_side, self.max_side = min_side, max_side

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] and `annot` [G, 5]; adds `scale` and `size`, as Resizer does."""
        image, boxes, labels = _to_tv(sample)
        size = np.array(image.shape[1:])  # height, width
        canvas = -(-self.max_side // SIZE_DIVISOR) * SIZE_DIVISOR
        scale = float(resized_sizes(size[None], self.min_side, self.max_side)[0][0])
        scale *= np.random.uniform(self.low, self.high)
        # Cropped before it is resized: memory stays that of the canvas, whatever the factor.
        height, width = cut = np.clip(int(canvas / scale), 1, size).tolist()
        top, left = (np.random.randint(0, rest + 1) for rest in size - cut)
        resized = np.clip(np.round(np.multiply(cut, scale)), 1, canvas).astype(int).tolist()
        crop = partial(tv.crop, top=top, left=left, height=height, width=width)
        pixels = crop(image)[None].clone(memory_format=torch.channels_last)
        image = pad_images(_interpolate(pixels, resized), canvas, canvas)[0]
        cropped = crop(boxes)
        kept = _areas(cropped) >= self.MIN_REST * _areas(boxes)
        sample = _from_tv(sample, image, tv.resize(cropped, resized)[kept], labels[kept])
        annotations = clip_to_image(sample["annot"], *resized)
        return {**sample, "annot": annotations, "scale": scale, "size": tuple(resized)}


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
