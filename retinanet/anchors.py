"""Anchors: the reference boxes that the network classifies and moves (RetinaNet, section 4, "Anchors").

Every location of every pyramid level carries nine anchors: three sizes within an octave x three shapes.
Their areas run from 32^2 pixels on P3 to 512^2 on P7, so that a neighbouring size is always a factor
2^(1/3) away, and some anchor overlaps almost any object well.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PYRAMID_LEVELS = (3, 4, 5, 6, 7)
RATIOS = (0.5, 1.0, 2.0)  # height / width
SCALES = (2.0**0, 2.0 ** (1 / 3), 2.0 ** (2 / 3))


def generate_anchors(
    base_size: float = 16, ratios: Sequence[float] | None = None, scales: Sequence[float] | None = None
) -> Tensor:
    """The anchors of one location, centred on the origin.

    Args:
        base_size: side of the square anchor of scale 1, pixels.
        ratios: height / width of the shapes; all shapes of one scale have the same area.
        scales: factors on `base_size`.

    Returns:
        [len(ratios) * len(scales), 4] float32 xyxy, pixels; all scales of the first ratio come first.
    """
    ratios = torch.tensor(RATIOS if ratios is None else ratios, dtype=torch.float64)
    scales = torch.tensor(SCALES if scales is None else scales, dtype=torch.float64)
    widths = base_size * scales / ratios.sqrt()[:, None]  # [R, S]
    heights = widths * ratios[:, None]  # [R, S]
    half_sizes = torch.stack([widths, heights], dim=-1).reshape(-1, 2) / 2
    return torch.cat([-half_sizes, half_sizes], dim=-1).float()


class Anchors(nn.Module):
    """All anchors of an input size, level by level, row by row.

    Holds no learned or saved state; `to(device)` moves it with the model.

    Args:
        pyramid_levels: P3 to P7 by default.
        strides: pixels between locations, one a level; 2^level by default.
        sizes: side of the square anchor of scale 1, pixels, one a level; 2^(level + 2) by default.
        ratios: height / width; (1/2, 1, 2) by default.
        scales: factors on the sizes; (2^0, 2^(1/3), 2^(2/3)) by default.
        cells: [levels, num_anchors, 4] xyxy around a location, pixels, in place of sizes, ratios and scales:
            other libraries round theirs, or put them elsewhere.

    Raises:
        ValueError: `strides` or `sizes` do not have one entry a level, or a number is not positive.
    """

    def __init__(
        self,
        pyramid_levels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        sizes: Sequence[float] | None = None,
        ratios: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
        cells: Sequence[Sequence[Sequence[float]]] | None = None,
    ):
        super().__init__()
        self.pyramid_levels = list(PYRAMID_LEVELS if pyramid_levels is None else pyramid_levels)
        self.strides = [2**level for level in self.pyramid_levels] if strides is None else list(strides)
        self.sizes = [2 ** (level + 2) for level in self.pyramid_levels] if sizes is None else list(sizes)
        self.ratios = list(RATIOS if ratios is None else ratios)
        self.scales = list(SCALES if scales is None else scales)
        for name in ("strides", "sizes"):
            if len(getattr(self, name)) != len(self.pyramid_levels):
                raise ValueError(f"{name} needs one entry for each of the levels {self.pyramid_levels}")
        if min(*self.strides, *self.sizes, *self.ratios, *self.scales) <= 0:
            raise ValueError("anchor strides, sizes, ratios and scales must be positive")
        self.explicit = {} if cells is None else {"cells": cells}
        if cells is None:
            boxes = torch.stack([generate_anchors(size, self.ratios, self.scales) for size in self.sizes])
        else:
            boxes = torch.tensor(cells)
        self.register_buffer("cells", boxes, persistent=False)  # [levels, num_anchors, 4]

    def _apply(self, *args: Any, **kwargs: Any) -> "Anchors":
        """What `to`, `half` and the like call: anchors move to the network's device, but keep their precision."""
        cells = Anchors(**self.settings()).cells if self.cells.is_meta else self.cells
        super()._apply(*args, **kwargs)
        self.cells = cells.to(self.cells.device)
        return self

    @property
    def num_anchors(self) -> int:
        """Anchors at each location: 9 by default."""
        return self.cells.shape[1]

    def settings(self) -> dict[str, list]:
        """The constructor's arguments as plain lists, so that a checkpoint can carry them."""
        names = ("pyramid_levels", "strides", "sizes", "ratios", "scales")
        return {name: list(getattr(self, name)) for name in names} | self.explicit

    def level_shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of each level's feature map, for an input of `height` x `width` pixels."""
        # Rounded up; not as -(-height // stride), because torch.onnx rounds a negative quotient towards zero.
        return [((height + stride - 1) // stride, (width + stride - 1) // stride) for stride in self.strides]

    def level_sizes(self, height: int, width: int) -> list[int]:
        """Number of anchors of each level, for an input of `height` x `width` pixels."""
        return [rows * columns * self.num_anchors for rows, columns in self.level_shapes(height, width)]

    def forward(self, images: Tensor) -> Tensor:
        """Anchors for a batch of images.

        Args:
            images: [B, 3, H, W]; only the shape and the device are used.

        Returns:
            [1, A, 4] float32 xyxy, pixels of the input, on the images' device.
        """
        levels = []
        shapes = self.level_shapes(*images.shape[-2:])
        for cell, stride, (rows, columns) in zip(self.cells.to(images.device), self.strides, shapes, strict=True):
            # Paper: silent. Original: a location stands at the centre of its cell. Here: the same (torchvision
            # and detectron2 use the cell's corner, so their weights expect anchors half a stride away).
            x = (torch.arange(columns, device=images.device) + 0.5) * stride
            y = (torch.arange(rows, device=images.device) + 0.5) * stride
            centres = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)
            boxes = centres.repeat(1, 1, 2)[:, :, None] + cell  # [rows, columns, num_anchors, 4]
            levels.append(boxes.reshape(-1, 4))
        return torch.cat(levels)[None]
