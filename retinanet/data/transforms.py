"""What happens to a sample between its file and the network: sample -> sample.

A transform keeps the dtype that it gets, and never changes its input in place. Random ones draw from NumPy's
global generator, which `loader.read_sample` seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

# ImageNet's mean and standard deviation of RGB, for pixels from 0 to 1.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

SIZE_DIVISOR = 32  # the stride of C5: padded to it, every level of the pyramid doubles the next one exactly


def normalize(images: Tensor) -> Tensor:
    """[B, 3, H, W] uint8 -> float32 of zero mean and unit variance, channels_last, on the same device.

    Floating-point images pass unchanged: they count as normalised.
    """
    if images.is_floating_point():
        return images
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
    batch = images[0].new_empty(len(images), height, width, 3).permute(0, 3, 1, 2)
    colour = pad_value(batch.dtype)[:, None, None]
    for row, image in zip(batch, images, strict=True):
        bottom, right = image.shape[1:]
        row[:, :bottom, :right] = image
        row[:, :bottom, right:] = colour
        row[:, bottom:] = colour
    return batch


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


class Augmenter:
    """Mirrors a sample left to right, half of the time (RetinaNet, section 4.1, "Optimization")."""

    def __call__(self, sample: dict[str, Any], flip_x: float = 0.5) -> dict[str, Any]:
        """Mirror with probability `flip_x`."""
        if np.random.rand() >= flip_x:
            return sample
        image, annotations = np.asarray(sample["img"]), np.array(sample["annot"])
        annotations[:, [0, 2]] = image.shape[1] - annotations[:, [2, 0]]
        # torch's flip is several times faster than NumPy's, whose copy would follow.
        mirrored = torch.from_numpy(np.ascontiguousarray(image)).flip(1).numpy()
        return {**sample, "img": mirrored, "annot": annotations}


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
        image = torch.from_numpy(np.ascontiguousarray(sample["img"])).permute(2, 0, 1)  # [3, H, W]
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
        image, annotations = np.asarray(sample["img"]), np.array(sample["annot"])
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
        (x, y), (width, height) = start, cut
        annotations = annotations[inside]
        annotations[:, :4] = (annotations[:, :4] - [x, y, x, y]).clip(0, [width, height, width, height])
        return {**sample, "img": image[y : y + height, x : x + width].copy(), "annot": annotations}


def resized_sizes(sizes: np.ndarray, min_side: int, max_side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How Resizer scales images of `sizes` [N, 2], height and width.

    Returns:
        Scales [N], resized size / original size; and the sizes after resizing [N, 2] and after padding [N, 2], int.
    """
    scales = np.minimum(min_side / sizes.min(axis=1), max_side / sizes.max(axis=1))
    resized = np.maximum(1, np.round(sizes * scales[:, None])).astype(np.int64)
    # Paper: silent. Original: pads 32 px more where the size already divides by 32. Here: pads nothing there.
    return scales, resized, -(-resized // SIZE_DIVISOR) * SIZE_DIVISOR


class Resizer:
    """Scales the short side to `min_side`, unless the long side would exceed `max_side`; pads to multiples of 32."""

    # Paper: 600 to 800 / 1333 pixels. Original: 608 / 1024, in float64. Here: the original's sizes, antialiased
    # on uint8, because it is many times faster and looks the same.
    def __init__(self, min_side: int = 608, max_side: int = 1024):
        self.min_side = min_side
        self.max_side = max_side

    def __call__(
        self, sample: dict[str, Any], min_side: int | None = None, max_side: int | None = None
    ) -> dict[str, Any]:
        """Adds `scale` (resized size / original size) and `size` (height and width before the padding)."""
        # torch resizes channels_last bytes without copying them, in two thirds of the time.
        image = torch.from_numpy(np.ascontiguousarray(sample["img"]))[None].permute(0, 3, 1, 2)  # [1, 3, H, W]
        sizes = np.array([image.shape[2:]])
        scales, resized, padded = resized_sizes(sizes, min_side or self.min_side, max_side or self.max_side)
        scale, size = float(scales[0]), tuple(resized[0].tolist())
        resized = F.interpolate(image, size, mode="bilinear", antialias=True)
        canvas = pad_images(resized, *padded[0].tolist())[0].permute(1, 2, 0)  # [H, W, 3]
        annotations = torch.from_numpy(np.array(sample["annot"], dtype=np.float32).reshape(-1, 5))
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
