"""The box head computed only where its answer counts: the numbers of the dense head, at a fraction of its cost.

The box loss looks at positive anchors alone, and detection at the candidates above the score threshold alone: a few
hundred of a hundred thousand anchors. So each level is cut into tiles of 8 x 8 locations, and the head runs on those
tiles that hold a location that counts:

    an output depends on the 11 x 11 locations around it      +-----------------+
    (five 3x3 convolutions reach 5 locations far), so a tile  |  margin of 5    |
    is taken with a margin of 5. Each convolution, unpadded,  |   +---------+   |
    consumes one location of the margin on every side:        |   |  8 x 8  |   |
    18 -> 16 -> 14 -> 12 -> 10 -> 8.                          |   +---------+   |
                                                              +-----------------+

Where the margin lies outside the level, the dense head sees the zeros that pad each convolution's input: the same
zeros are put there before each convolution. A tile with its margin costs 2.7 times as much as its share of the dense
head; where too many tiles count, the whole level is computed as usual, whichever is cheaper. The coarsest level
always is: it costs next to nothing, and all weights of the head then have a gradient, as DistributedDataParallel
wants.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE = 8  # locations of a tile's side
MARGIN = 5  # locations that five 3x3 convolutions reach
SIDE = TILE + 2 * MARGIN
COST = 2.7  # of a tile with its margin, in shares of the dense head


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
    """The head's outputs on a level as the dense head gives them, [B, H * W * num_anchors, 4]; 0 beside the tiles."""
    outputs = _run_tiles(head, level, image, corner)  # [N, TILE, TILE, num_anchors * 4]
    batch, _, height, width = level.shape
    steps = torch.arange(TILE, device=level.device)
    y, x = corner[:, :1] + steps, corner[:, 1:] + steps  # [N, TILE] each
    inside = (y < height)[:, :, None] & (x < width)[:, None]  # [N, TILE, TILE]
    rows = (image[:, None, None] * height + y[:, :, None]) * width + x[:, None]
    rows = torch.where(inside, rows, batch * height * width)  # one row more takes what lies outside
    deltas = outputs.new_zeros(batch * height * width + 1, outputs.shape[-1])
    deltas = deltas.index_copy(0, rows.flatten(), outputs.flatten(0, 2))
    return deltas[:-1].view(batch, -1, head.num_outputs)


def _active_tiles(counts: Tensor) -> Tensor:
    """[B, H, W] bool: the locations that count -> [B, rows, columns] bool: the tiles that hold one of them."""
    bottom, right = (-side % TILE for side in counts.shape[1:])
    padded = F.pad(counts, (0, right, 0, bottom))
    return padded.unflatten(2, (-1, TILE)).unflatten(1, (-1, TILE)).any(dim=(2, 4))


def _where(active: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Image [N] and first row and column [N, 2] of the `number` active tiles; nothing waits for a GPU."""
    tile = active.flatten().int().argsort(descending=True, stable=True)[:number]  # [N]
    _, rows, columns = active.shape
    return tile // (rows * columns), torch.stack([tile // columns % rows, tile % columns], dim=1) * TILE


class Plan:
    """The tiles to compute. A GPU is asked at once how many there are; only `tiles` waits for the answer.

    Args:
        counts: [B, A] bool: the anchors whose deltas count.
        level_shapes: rows and columns of each level.

    Attributes:
        levels: [B, rows, columns] bool of each level: the tiles that hold an anchor that counts.
    """

    def __init__(self, counts: Tensor, level_shapes: Sequence[tuple[int, int]]):
        num_anchors = counts.shape[1] // sum(rows * columns for rows, columns in level_shapes)
        parts = counts.split([rows * columns * num_anchors for rows, columns in level_shapes], dim=1)
        self.levels = [
            _active_tiles(part.view(len(part), *shape, num_anchors).any(dim=3))
            for part, shape in zip(parts, level_shapes, strict=True)
        ]
        self._numbers, self._arrived = torch.stack([active.sum() for active in self.levels]), None
        if counts.device.type == "cuda" and torch.cuda.is_available():
            self._numbers, self._arrived = self._numbers.to("cpu", non_blocking=True), torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[int]:
        """How many tiles each level has."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()

    def tiles(self) -> list[tuple[Tensor, Tensor] | None]:
        """Of each level the images [N] and corners [N, 2] of its tiles; None for the dense head."""
        return [
            None if active is self.levels[-1] or number * COST >= active.numel() else _where(active, number)
            for active, number in zip(self.levels, self.numbers(), strict=True)
        ]


def run(head: nn.Module, pyramid: Sequence[Tensor], plan: Plan) -> Tensor:
    """The box head's deltas [B, A, 4]: equal to the dense head's for the anchors that count.

    Args:
        head: the box head.
        pyramid: [B, C, H, W] of each level.
        plan: what to compute.
    """
    levels = zip(pyramid, plan.tiles(), strict=True)
    return torch.cat([head(level) if tiles is None else _run_level(head, level, *tiles) for level, tiles in levels], 1)
