"""The box head computed only where its output is needed: the dense head's numbers at a fraction of its cost.

The box loss uses only positive anchors, and detection only the candidates above the score threshold: a few hundred of
a hundred thousand anchors. So each level is divided into tiles of 8 x 8 locations, and the head runs only on the tiles
that contain a needed location:

    an output depends on the 11 x 11 locations around it      +-----------------+
    (five 3x3 convolutions reach 5 locations far), so a tile  |  margin of 5    |
    is taken with a margin of 5. Each convolution, unpadded,  |   +---------+   |
    consumes one location of the margin on every side:        |   |  8 x 8  |   |
    18 -> 16 -> 14 -> 12 -> 10 -> 8.                          |   +---------+   |
                                                              +-----------------+

Outside the level, the dense head sees the zeros that pad each convolution's input, so that part of the margin is set to
zero before each convolution. A tile with its margin costs 2.7 times its share of the dense head, so the dense head
computes any level where it is cheaper. It always computes the coarsest level, which costs next to nothing: then all
weights of the head have a gradient, as DistributedDataParallel requires.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 8  # side of a tile, in locations
MARGIN = 5  # how far five 3x3 convolutions reach, in locations
SIDE = TILE + 2 * MARGIN
COST = 2.7  # of a tile with its margin, relative to the tile's share of the dense head


def _run_tiles(head: nn.Module, level: Tensor, image: Tensor, corner: Tensor) -> Tensor:
    """The head's outputs [N, TILE, TILE, num_anchors * 4] on tiles of a level [B, C, H, W]."""
    height, width = level.shape[2:]
    steps = torch.arange(SIDE, device=level.device) - MARGIN
    y, x = corner[:, :1] + steps, corner[:, 1:] + steps  # [N, SIDE] each
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]  # [N, SIDE, SIDE]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    rows = (image[:, None, None] * height + y[:, :, None]) * width + x[:, None]  # [N, SIDE, SIDE]
    locations = level.permute(0, 2, 3, 1).reshape(-1, level.shape[1])  # [B * H * W, C]
    tiles = locations.index_select(0, rows.flatten())  # [N * SIDE * SIDE, C]
    tiles = tiles.view(*rows.shape, level.shape[1]).permute(0, 3, 1, 2)  # [N, C, SIDE, SIDE], channels_last
    inside = inside[:, None]
    tiles = tiles * inside
    for conv in (head.conv1, head.conv2, head.conv3, head.conv4):
        inside = inside[:, :, 1:-1, 1:-1]
        tiles = F.relu(F.conv2d(tiles, conv.weight, conv.bias), inplace=True) * inside
    return F.conv2d(tiles, head.output.weight, head.output.bias).permute(0, 2, 3, 1)


def _run_level(head: nn.Module, level: Tensor, image: Tensor, corner: Tensor) -> Tensor:
    """The head's outputs on a level, laid out as the dense head's: [B, H * W * num_anchors, 4]; 0 outside the tiles."""
    outputs = _run_tiles(head, level, image, corner)  # [N, TILE, TILE, num_anchors * 4]
    batch, _, height, width = level.shape
    steps = torch.arange(TILE, device=level.device)
    y, x = corner[:, :1] + steps, corner[:, 1:] + steps  # [N, TILE] each
    inside = (y < height)[:, :, None] & (x < width)[:, None]  # [N, TILE, TILE]
    rows = (image[:, None, None] * height + y[:, :, None]) * width + x[:, None]
    rows = torch.where(inside, rows, batch * height * width)  # an extra row takes what lies outside
    deltas = outputs.new_zeros(batch * height * width + 1, outputs.shape[-1])
    deltas = deltas.index_copy(0, rows.flatten(), outputs.flatten(0, 2))
    return deltas[:-1].view(batch, -1, head.num_outputs)


def _active_tiles(needed: Tensor) -> Tensor:
    """[B, H, W] bool, the needed locations -> [B, rows, columns] bool, the tiles that contain one of them."""
    bottom, right = (-side % TILE for side in needed.shape[1:])
    padded = F.pad(needed, (0, right, 0, bottom))
    return padded.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).any(dim=(2, 4))


def _where(active: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Image [N] and first row and column [N, 2] of the `number` active tiles, without waiting for a GPU."""
    tile = active.flatten().int().argsort(descending=True, stable=True)[:number]  # [N]
    _, rows, columns = active.shape
    return tile // (rows * columns), torch.stack([tile // columns % rows, tile % columns], dim=1) * TILE


class Plan:
    """The tiles to compute. A GPU starts to copy their number to the host at once; only `numbers` waits for it.

    Args:
        needed: [B, A] bool: the anchors whose deltas are needed.
        level_shapes: rows and columns of each level.

    Attributes:
        levels: [B, rows, columns] bool of each level: the tiles that contain a needed anchor.
    """

    def __init__(self, needed: Tensor, level_shapes: Sequence[tuple[int, int]]):
        num_anchors = needed.shape[1] // sum(rows * columns for rows, columns in level_shapes)
        parts = needed.split([rows * columns * num_anchors for rows, columns in level_shapes], dim=1)
        self.levels = [
            _active_tiles(part.view(len(part), *shape, num_anchors).any(dim=3))
            for part, shape in zip(parts, level_shapes, strict=True)
        ]
        self._numbers, self._arrived = torch.stack([active.sum() for active in self.levels]), None
        if needed.device.type == "cuda" and torch.cuda.is_available():
            self._numbers, self._arrived = self._numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[int]:
        """Number of tiles on each level that contain a needed anchor."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()

    def tiles(self) -> list[tuple[Tensor, Tensor] | None]:
        """For each level the images [N] and corners [N, 2] of its tiles, or None if the dense head computes it."""
        return [
            None if active is self.levels[-1] or number * COST >= active.numel() else _where(active, number)
            for active, number in zip(self.levels, self.numbers(), strict=True)
        ]


@torch.compiler.disable  # with a varying number of tiles, torch 2.14 expects gradients of another memory layout
def run(head: nn.Module, pyramid: Sequence[Tensor], plan: Plan) -> Tensor:
    """The box head's deltas [B, A, 4]: equal to the dense head's for the needed anchors.

    Args:
        head: the box head.
        pyramid: [B, C, H, W] of each level.
        plan: the tiles to compute.
    """
    levels = zip(pyramid, plan.tiles(), strict=True)
    return torch.cat([head(level) if tiles is None else _run_level(head, level, *tiles) for level, tiles in levels], 1)
