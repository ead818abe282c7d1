"""Anchors: the reference boxes that the network classifies and moves (RetinaNet, section 4, "Anchors").

"The anchors have areas of 32^2 to 512^2 on pyramid levels P3 to P7, respectively. [...] at each pyramid level we use
anchors at three aspect ratios {1:2, 1:1, 2:1}. For denser scale coverage than in [the FPN paper], at each level we
add anchors of sizes {2^0, 2^(1/3), 2^(2/3)} of the original set of 3 aspect ratio anchors."

So every location of every level has 9 anchors, and neighbouring sizes differ by a factor of 2^(1/3): some anchor
overlaps well with almost any object of 32 to 813 pixels.
"""

from collections.abc import Sequence

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
        scales: factors that multiply `base_size`.

    Returns:
        [len(ratios) * len(scales), 4] float32 xyxy, pixels; all scales of the first ratio come first.
    """
    ratios = torch.tensor(RATIOS if ratios is None else ratios, dtype=torch.float64, device="cpu")
    scales = torch.tensor(SCALES if scales is None else scales, dtype=torch.float64, device="cpu")
    widths = base_size * scales / ratios.sqrt()[:, None]  # [R, S]
    heights = widths * ratios[:, None]  # [R, S]
    half_sizes = torch.stack([widths, heights], dim=-1).reshape(-1, 2) / 2
    return torch.cat([-half_sizes, half_sizes], dim=-1).float()


def shift(shape: Sequence[int], stride: int, anchors: Tensor) -> Tensor:
    """Copy the anchors of one location to every location of a level.

    Args:
        shape: rows and columns of the level's feature map.
        stride: pixels between neighbouring locations.
        anchors: [A, 4] xyxy, pixels, centred on the origin.

    Returns:
        [rows * columns * A, 4] float32 xyxy, pixels of the input: row by row, all anchors of a location together.
    """
    rows, columns = shape
    anchors = torch.as_tensor(anchors, dtype=torch.float32)
    # Paper: silent. Original: a location is the centre of its cell. Here: the same (torchvision and detectron2 use
    # the cell's corner, so their weights expect anchors half a stride away).
    x = (torch.arange(columns, dtype=torch.float32, device=anchors.device) + 0.5) * stride
    y = (torch.arange(rows, dtype=torch.float32, device=anchors.device) + 0.5) * stride
    centres = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1)
    return (centres.repeat(1, 1, 2)[:, :, None] + anchors).reshape(-1, 4)


def compute_shape(image_shape: Sequence[int], pyramid_levels: Sequence[int]) -> list[tuple[int, int]]:
    """Rows and columns of each level's feature map, for an input of `image_shape` (height, width, ...) pixels."""
    return _map_shapes(*image_shape[:2], [2**level for level in pyramid_levels])


def _map_shapes(height: int, width: int, strides: Sequence[int]) -> list[tuple[int, int]]:
    # Rounded up; not as -(-height // stride), because torch.onnx rounds a negative quotient towards zero.
    return [((height + stride - 1) // stride, (width + stride - 1) // stride) for stride in strides]


def anchors_for_shape(
    image_shape: Sequence[int],
    pyramid_levels: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    strides: Sequence[int] | None = None,
    sizes: Sequence[float] | None = None,
    shapes_callback: None = None,
) -> Tensor:
    """All anchors of an input of `image_shape` (height, width, ...): [A, 4] float32 xyxy, pixels; see `Anchors`.

    `shapes_callback` is part of the original's signature; nothing uses it, here or there.
    """
    return Anchors(pyramid_levels, strides, sizes, ratios, scales).of_size(*image_shape[:2])


class Anchors(nn.Module):
    """All anchors of an input size, level by level, row by row; the module adds nothing to a state dict.

    Args:
        pyramid_levels: P3 to P7 by default.
        strides: pixels between locations, one per level; 2^level by default.
        sizes: side of the square anchor of scale 1, pixels, one per level; 2^(level + 2) by default.
        ratios: height / width; (1/2, 1, 2) by default.
        scales: factors that multiply the sizes; (2^0, 2^(1/3), 2^(2/3)) by default.

    Attributes:
        cells: [levels, num_anchors, 4] float32 xyxy: the anchors of one location of each level, centred on the origin.

    Raises:
        ValueError: `strides` or `sizes` do not have one entry per level, or a number is not positive.
    """

    def __init__(
        self,
        pyramid_levels: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        sizes: Sequence[float] | None = None,
        ratios: Sequence[float] | None = None,
        scales: Sequence[float] | None = None,
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
        self.cells = torch.stack([generate_anchors(size, self.ratios, self.scales) for size in self.sizes])

    @property
    def num_anchors(self) -> int:
        """Anchors at each location: 9 by default."""
        return self.cells.shape[1]

    def settings(self) -> dict[str, list]:
        """The constructor's arguments as plain lists, so that a checkpoint can carry them."""
        return {name: list(getattr(self, name)) for name in ("pyramid_levels", "strides", "sizes", "ratios", "scales")}

    def level_shapes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Rows and columns of each level's feature map, for an input of `height` x `width` pixels."""
        return _map_shapes(height, width, self.strides)

    def level_sizes(self, height: int, width: int) -> list[int]:
        """Number of anchors of each level, for an input of `height` x `width` pixels."""
        return [rows * columns * self.num_anchors for rows, columns in self.level_shapes(height, width)]

    def of_size(self, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
        """[A, 4] float32 xyxy: all anchors of an input of `height` x `width` pixels."""
        levels = zip(self.level_shapes(height, width), self.strides, self.cells.to(device), strict=True)
        return torch.cat([shift(shape, stride, cell) for shape, stride, cell in levels])

    def forward(self, images: Tensor) -> Tensor:
        """Anchors for a batch of images.

        Args:
            images: [B, 3, H, W]; only the shape and the device are used.

        Returns:
            [1, A, 4] float32 xyxy, pixels of the input, on the images' device.
        """
        return self.of_size(*images.shape[-2:], images.device)[None]
