"""What happens to a sample between its file and the network: sample -> sample.

A transform keeps the dtype that it gets and leaves its input as it was. Random ones draw from NumPy's
global generator, which data-loading workers seed.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ImageNet's mean and standard deviation of RGB, for pixels from 0 to 1.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)

SIZE_DIVISOR = 32  # the stride of C5: padded to it, every level of the pyramid doubles the next one exactly


def normalize(images: Tensor) -> Tensor:
    """Scale pixels to zero mean and unit variance, on whatever device they are.

    Args:
        images: [..., 3, H, W] uint8. Floating-point images pass unchanged: they are taken as normalised.

    Returns:
        Same shape and memory format, float32.
    """
    if images.is_floating_point():
        return images
    scale = torch.tensor([1 / (255 * std) for std in PIXEL_STD], device=images.device)
    shift = torch.tensor([-mean / std for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True)], device=images.device)
    return torch.addcmul(shift[:, None, None], images.float(), scale[:, None, None])


def pad_value(dtype: torch.dtype) -> Tensor:
    """The colour [3] that pads images of a dtype: the mean colour, which is 0 once normalised."""
    if dtype == torch.uint8:
        return (torch.tensor(PIXEL_MEAN) * 255).round().to(torch.uint8)
    return torch.zeros(3, dtype=dtype)


class Normalizer:
    """Pixels -> float32 of zero mean and unit variance (ImageNet's). uint8 is taken as 0-255, float as 0-1."""

    def __init__(self):
        self.mean = np.array(PIXEL_MEAN, dtype=np.float32)
        self.std = np.array(PIXEL_STD, dtype=np.float32)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = np.asarray(sample["img"])
        image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image.astype(np.float32)
        return {**sample, "img": (image - self.mean) / self.std}


class UnNormalizer:
    """The inverse of Normalizer for a picture to look at: [..., 3, H, W] normalised -> the same, 0-1."""

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None):
        self.mean = PIXEL_MEAN if mean is None else mean
        self.std = PIXEL_STD if std is None else std

    def __call__(self, tensor: Tensor) -> Tensor:
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
        return {**sample, "img": np.flip(image, axis=1).copy(order="K"), "annot": annotations}


class Resizer:
    """Scales the short side to `min_side`, unless the long side would pass `max_side`; pads to multiples of 32.

    Args:
        min_side: pixels of the short side.
        max_side: limit of the long side, pixels.
    """

    # Paper: 600 to 800 / 1333 pixels. Original: 608 / 1024, in float64. Here: the original's sizes, antialiased
    # on uint8, because it is many times faster and looks the same.
    def __init__(self, min_side: int = 608, max_side: int = 1024):
        self.min_side = min_side
        self.max_side = max_side

    def __call__(
        self, sample: dict[str, Any], min_side: int | None = None, max_side: int | None = None
    ) -> dict[str, Any]:
        """Adds `scale` (resized size / original size) and `size` (height and width before the padding)."""
        image = torch.from_numpy(np.ascontiguousarray(sample["img"])).permute(2, 0, 1)  # [3, H, W]
        height, width = image.shape[1:]
        scale = (min_side or self.min_side) / min(height, width)
        scale = min(scale, (max_side or self.max_side) / max(height, width))
        # Paper: silent. Original: pads 32 px more where the size already divides by 32. Here: pads nothing there.
        size = max(1, round(height * scale)), max(1, round(width * scale))
        padded = [math.ceil(side / SIZE_DIVISOR) * SIZE_DIVISOR for side in size]
        canvas = pad_value(image.dtype).expand(*padded, 3).contiguous()  # [H, W, 3]
        resized = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        canvas[: size[0], : size[1]] = resized.permute(1, 2, 0)
        annotations = torch.from_numpy(np.array(sample["annot"], dtype=np.float32).reshape(-1, 5))
        annotations[:, :4] *= scale
        return {**sample, "img": canvas, "annot": annotations, "scale": scale, "size": size}
