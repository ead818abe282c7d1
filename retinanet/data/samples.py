"""Samples, dicts with `img` [H, W, 3] and `annot` [G, 5], and the check that a transform returns one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from retinanet.data.report import MIN_SIDE
from retinanet.errors import UserError, shown

MAX_NORMALISED = 100.0  # no normalised pixel is so far from 0; such an image holds 0 to 255


class SampleError(UserError):
    """A transform got or returned something that is not a sample; the data set adds the image and the transform."""


def sample_parts(sample: Any) -> tuple[np.ndarray, np.ndarray]:
    """The image [H, W, 3] and the annotations [G, 5] of a sample, as arrays that may share its memory.

    Raises:
        SampleError: they are missing, or have a wrong shape or dtype.
    """
    try:
        image, annotations = np.asarray(sample["img"]), np.asarray(sample["annot"])
    except (TypeError, LookupError, ValueError, RuntimeError) as error:  # such as tensors on a GPU
        text = f"a {type(sample).__name__} is not a sample, which is a dict with the arrays img and annot"
        raise SampleError(f"{text} ({type(error).__name__}: {error})") from error
    if not (image.dtype == np.uint8 or image.dtype.kind == "f") or image.shape[2:] != (3,) or not image.size:
        raise SampleError(f"img must be [H, W, 3], uint8 or normalised floats, not {image.dtype} {list(image.shape)}")
    if annotations.ndim != 2 or annotations.shape[1] != 5 or annotations.dtype.kind not in "fi":
        found = f"{annotations.dtype} {list(annotations.shape)}"
        raise SampleError(f"annot must be numbers [G, 5] (x1, y1, x2, y2, label), without boxes [0, 5], not {found}")
    return image, annotations


def check_sample(sample: Any, num_classes: int) -> dict[str, Any]:
    """Check what a transform returned; `img` becomes uint8 or float32, `annot` float32, both tensors if `img` is one.

    Raises:
        SampleError: it is not a sample, or its boxes, labels or pixels are impossible.
    """
    image, annotations = sample_parts(sample)
    height, width, _ = image.shape
    for row in annotations.tolist():  # for a few boxes three times as fast as NumPy
        x1, y1, x2, y2, label = row
        # Resizer rounds the image's size, not the boxes, which may end beyond it.
        inside = -1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1
        if not (inside and 0 <= label < num_classes and label % 1 == 0):
            wanted = f"x1 < x2 and y1 < y2 within the image, {height} x {width}, a label from 0 to {num_classes - 1}"
            raise SampleError(f"annot holds {shown(row)}, but must have {wanted}")
    is_float = image.dtype != np.uint8
    if is_float and not -MAX_NORMALISED < image.min() <= image.max() < MAX_NORMALISED:
        raise SampleError("img holds floats far from 0: keep pixels of 0 to 255 as uint8, or use Normalizer")
    image = np.require(image, np.float32 if is_float else np.uint8, "CW")
    annotations = np.require(annotations, np.float32, "CW")
    if isinstance(sample["img"], torch.Tensor):
        image, annotations = torch.from_numpy(image), torch.from_numpy(annotations)
    return {**sample, "img": image, "annot": annotations}


def clip_to_image(annotations: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip boxes [G, 5] to the image, in place, and drop those with a side of less than a pixel left."""
    boxes = annotations[:, :4]
    boxes.clip(0, np.array((width, height, width, height), boxes.dtype), out=boxes)
    return annotations[(boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)]


def crop_boxes(annotations: np.ndarray, start: np.ndarray, size: np.ndarray, min_share: float = 0) -> np.ndarray:
    """The boxes [G, 5] in a part of an image, from `start` (x, y) with `size` (width, height), clipped to it.

    Boxes with less than `min_share` of their area left are dropped.
    """
    part = annotations.copy()
    part[:, :4] = (part[:, :4] - np.tile(start, 2)).clip(0, np.tile(size, 2))
    before, after = ((boxes[:, 2:4] - boxes[:, :2]).prod(axis=1) for boxes in (annotations, part))
    return part[after >= min_share * before]


def transform_name(transform: Callable[[dict], dict]) -> str:
    """The name of a transform, with the names of a Compose's steps, for messages.

    Raises:
        UserError: a step is torchvision's, which would ignore a sample's arrays or take [H, W, 3] for [C, H, W].
    """
    name = getattr(transform, "__qualname__", type(transform).__qualname__)
    if isinstance(steps := getattr(transform, "transforms", None), list | tuple | torch.nn.ModuleList):
        return f"{name}({', '.join(map(transform_name, steps))})"
    if isinstance(transform, v2.Transform):
        raise UserError(f"transform {name} does not take samples: wrap it in V2 from retinanet.data.transforms")
    return name
