"""Tiles of large images: where they lie, batches of them, and how boxes of tiles become boxes of the image.

Tiles are squares of the image's own pixels, so that small objects keep their size. They overlap, so that an object on
the border of a tile lies whole in the next one, unless it is larger than the overlap.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retinanet.boxes import box_area, box_intersection, box_iou
from retinanet.data.samples import clip_to_image, crop_boxes
from retinanet.data.transforms import pad_images, padded_side
from retinanet.errors import UserError, shown

SIDES = (16, 16_384)  # limits of a tile's side, pixels
MAX_OVERLAP = 0.9  # share of a tile's side
OVERLAP = 0.25  # default overlap
BACKGROUND = 0.2  # default share of training tiles that are drawn anywhere
KEPT_SHARE = 0.4  # training tiles keep a box if at least this share of its area is inside
TRIES = 10  # draws of a training tile without a box
# A box counts as cut if it is this near to an inner border of its tile: a share of the box's side, or pixels.
NEAR_SHARE, NEAR_PIXELS = 0.1, 2
BAND_ROWS = 64  # rows of a reduced image that are computed together
COVERED = 0.5  # a cut box is part of a whole one if at least this share of it lies within that
SAME_IOU = 0.5  # boxes of two tiles are one object if they have this IoU where both tiles see them


@dataclass(frozen=True)
class Tiling:
    """How images are cut into tiles.

    Attributes:
        side: side of a tile, pixels.
        overlap: minimum share of the side that neighbours have in common.

    Raises:
        UserError: one of them is out of range.
    """

    side: int
    overlap: float = OVERLAP

    def __post_init__(self):
        if isinstance(self.side, bool) or not isinstance(self.side, int) or not SIDES[0] <= self.side <= SIDES[1]:
            limits = f"from {SIDES[0]} to {SIDES[1]}"
            raise UserError(f"tile must be a whole number of pixels {limits}, not {shown(self.side)}")
        if not isinstance(self.overlap, Real) or not 0 <= self.overlap <= MAX_OVERLAP:
            raise UserError(f"tile_overlap must be a share from 0 to {MAX_OVERLAP}, not {shown(self.overlap)}")

    def fits(self, height: int, width: int) -> bool:
        """Whether an image fits into one tile, so that it is not cut."""
        return max(height, width) <= self.side

    def _starts(self, length: int) -> list[int]:
        step = max(1, self.side - round(self.side * self.overlap))
        last = max(0, length - self.side)
        return [*range(0, last, step), last]

    def count(self, height: int, width: int) -> int:
        """Number of tiles of an image."""
        return len(self._starts(height)) * len(self._starts(width))

    def boxes(self, height: int, width: int) -> np.ndarray:
        """The tiles of an image, row by row: [T, 4] int xyxy; the last of a row or column is shifted inwards."""
        ys, xs = np.meshgrid(self._starts(height), self._starts(width), indexing="ij")
        corners = np.stack([xs.ravel(), ys.ravel()], axis=1)
        return np.concatenate([corners, np.minimum(corners + self.side, (width, height))], axis=1)

    def batches(self, image: np.ndarray, batch_size: int) -> Iterator[dict[str, Any]]:
        """The tiles of an image as batches like those of `collater`, at full resolution.

        Args:
            image: [H, W, 3] uint8, or an object that gives parts of such an array when sliced.
            batch_size: tiles per batch.

        Yields:
            `img` [B, 3, H, W] uint8; lists `size` and `scale`; and `tile` [B, 4] xyxy, pixels of the image.
        """
        tiles = self.boxes(*image.shape[:2])
        for group in np.split(tiles, range(batch_size, len(tiles), batch_size)):
            parts = [torch.from_numpy(image[y1:y2, x1:x2]).permute(2, 0, 1) for x1, y1, x2, y2 in group.tolist()]
            size = tuple(parts[0].shape[1:])
            images = pad_images(parts, *map(padded_side, size))
            yield {"img": images, "size": [size] * len(group), "scale": [1.0] * len(group), "tile": group}


@dataclass
class RandomTile:
    """Cuts out a random tile for training: one that holds a box, or sometimes background.

    The box is drawn first, each with equal probability, then a tile around it. Boxes are clipped to the tile, and
    dropped if less than KEPT_SHARE of their area is inside. Images that fit into a tile stay as they are.

    Args:
        side: side of the tile, pixels.
        background: share of tiles that are drawn anywhere, again until one holds no box, at most TRIES times.
    """

    side: int
    background: float = BACKGROUND

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Change `img` [H, W, 3] and `annot` [G, 5]."""
        image, annotations = sample["img"], np.array(sample["annot"])
        whole = np.array(image.shape[1::-1])  # width, height
        size = np.minimum(self.side, whole)
        if len(annotations) and np.random.rand() >= self.background:
            box = annotations[np.random.randint(len(annotations)), :4]
            # Between these starts, the tile contains the box, or a larger box contains the tile.
            starts = np.sort([np.ceil(box[2:] - self.side), np.floor(box[:2])], axis=0)
            (first, last), tries = starts.clip(0, whole - size).astype(int), 1
        else:
            first, last, tries = 0, whole - size, TRIES
        for _ in range(tries):
            start = np.random.randint(first, last + 1)
            kept = clip_to_image(crop_boxes(annotations, start, size, KEPT_SHARE), *size[::-1])  # drops slivers
            if not len(kept):
                break
        (x, y), (right, bottom) = start, start + size
        return {**sample, "img": np.ascontiguousarray(image[y:bottom, x:right]), "annot": kept}


def merge_cut_boxes(
    scores: Tensor, labels: Tensor, boxes: Tensor, tile_index: Tensor, tiles: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Join what the borders between tiles cut apart.

    Two boxes of a class from different tiles are one object if they agree where both tiles see them. An object has at
    most one box from each tile, because NMS has run on each tile. Among the boxes of an object, whole ones replace
    those that a border cuts. If all are cut, as with an object larger than the overlap, the box around them all
    replaces them, with the best of their scores. A cut box is also dropped if a tile that sees all of it has a whole
    box there with a better score, whatever its class, because half an object may look like another class.

    Args:
        scores: [N], in the order of the tiles.
        labels: [N].
        boxes: [N, 4] xyxy, pixels of the image, within their tiles.
        tile_index: [N] int, ascending: index of each box's tile.
        tiles: [T, 4] xyxy, pixels of the image, row by row.

    Returns:
        Scores, labels and boxes that remain; whole boxes may still repeat an object, so run NMS on them.
    """
    bounds = torch.cat([tiles[:, :2].amin(dim=0), tiles[:, 2:].amax(dim=0)])  # the image
    of_box = tiles[tile_index]  # [N, 4]
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    near = (boxes - of_box).abs() <= (NEAR_SHARE * sides).clamp(min=NEAR_PIXELS)
    cut = (near & (of_box != bounds)).any(dim=1)  # [N]
    pairs = _agreeing_pairs(labels, boxes, tile_index, tiles, cut)

    keep, boxes = torch.ones(len(boxes), dtype=torch.bool), boxes.clone()
    for members in _joined(pairs, tile_index):
        keep[members] = ~cut[members]
        if cut[members].all():
            parts, best = boxes[members], members[int(scores[members].argmax())]
            boxes[best] = torch.cat([parts[:, :2].amin(dim=0), parts[:, 2:].amax(dim=0)])
            keep[best] = True

    whole = (keep & ~cut).nonzero()[:, 0]  # [W]
    low, high = of_box[whole].split(2, dim=1)
    for chosen in (keep & cut).nonzero()[:, 0].split(256):  # [C]
        parts = boxes[chosen]
        seen = ((parts[:, None, :2] >= low) & (parts[:, None, 2:] <= high)).all(dim=2)  # [C, W]
        covered = box_intersection(parts, boxes[whole]) >= COVERED * box_area(parts)[:, None]
        keep[chosen] = ~(seen & covered & (scores[whole] >= scores[chosen, None])).any(dim=1)
    return scores[keep], labels[keep], boxes[keep]


def _agreeing_pairs(
    labels: Tensor, boxes: Tensor, tile_index: Tensor, tiles: Tensor, cut: Tensor
) -> list[tuple[float, int, int]]:
    """IoU and indices of the pairs of boxes that agree where both of their tiles see them; one at least is cut."""
    pairs, of_box = [], tiles[tile_index]
    for tile in tile_index.unique().tolist():
        begin, end = (int(torch.searchsorted(tile_index, value)) for value in (tile, tile + 1))
        # Boxes of earlier tiles that overlap this one. Tiles go down the image row by row, so their lower edges ascend.
        first = int(torch.searchsorted(of_box[:begin, 3].contiguous(), tiles[tile, 1], right=True))
        shared = box_intersection(of_box[first:begin], tiles[tile : tile + 1])[:, 0] > 0
        others = shared.nonzero()[:, 0] + first  # [M]
        low, high = of_box[others].maximum(tiles[tile]), of_box[others].minimum(tiles[tile])
        low, high = low[:, [0, 1, 0, 1]], high[:, [2, 3, 2, 3]]  # [M, 4]: the region that both tiles see
        own, theirs = boxes[begin:end, None].clamp(low, high), boxes[others].clamp(low, high)
        iou = box_iou(own[:, :, None], theirs[:, None])[:, :, 0, 0]  # [end - begin, M]
        possible = (labels[begin:end, None] == labels[others]) & (cut[begin:end, None] | cut[others])
        rows, columns = ((iou >= SAME_IOU) & possible).nonzero().unbind(dim=1)
        pairs += zip(iou[rows, columns].tolist(), (rows + begin).tolist(), others[columns].tolist(), strict=True)
    return pairs


def _joined(pairs: list[tuple[float, int, int]], tile_index: Tensor) -> list[list[int]]:
    """The boxes of each object, from pairs that agree, taken from the best one on; at most one box from each tile."""
    objects = {}  # index of each box in a pair -> indices of the boxes of its object
    for _, one, other in sorted(pairs, reverse=True):
        ours, theirs = objects.setdefault(one, [one]), objects.setdefault(other, [other])
        both = tile_index[ours + theirs]
        if ours is not theirs and len(both.unique()) == len(both):
            ours += theirs
            objects |= dict.fromkeys(theirs, ours)
    return [members for index, members in objects.items() if index == members[0] and len(members) > 1]


def overview(image: np.ndarray, limit: int) -> tuple[np.ndarray, float]:
    """Reduce an image, as `Tiling.batches` takes it, by a whole factor to sides of at most `limit` pixels.

    Returns it, [h, w, 3] uint8, and the scale (its size / the image's size).
    """
    height, width = image.shape[:2]
    factor = -(-max(height, width) // limit)
    if factor <= 1:
        return np.ascontiguousarray(image[:height, :width]), 1.0
    rows, columns = max(1, height // factor), max(1, width // factor)
    bands = []
    for top in range(0, rows, BAND_ROWS):
        bottom = min(top + BAND_ROWS, rows)
        band = torch.from_numpy(image[top * factor : bottom * factor, : columns * factor]).permute(2, 0, 1)[None]
        bands.append(F.interpolate(band, (bottom - top, columns), mode="bilinear", antialias=True)[0])
    return torch.cat(bands, dim=1).permute(1, 2, 0).contiguous().numpy(), 1 / factor
