"""Do these anchors fit my data? Measures which boxes can be learned, and searches for anchors that reach more.

A box that no anchor overlaps by an IoU of 0.5 is not the target of any anchor, so it cannot be learned, however long
the training. This affects small objects and long, thin ones, and no loss curve shows it.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from retinanet.anchors import Anchors
from retinanet.boxes import box_iou
from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import MIN_SIDE
from retinanet.data.transforms import resized_size
from retinanet.matcher import FOREGROUND_IOU

# Boxes are grouped by their side (square root of the area), pixels after resizing, with one group per factor of 2.
SIZE_EDGES = (0, 16, 32, 64, 128, 256, 512, math.inf)

WORTHWHILE_IOU = 0.05  # other anchors that reach no more boxes must raise the mean of the best IoUs by this
SEARCH_BOXES = 1500  # the search uses at most this many boxes
SEARCH_SCALES, SEARCH_RATIOS = (0.25, 3.0), (1 / 6, 6.0)  # bounds of the search


class Boxes(NamedTuple):
    """The boxes of a data set as the network receives them, after resizing."""

    boxes: np.ndarray  # [N, 4] float64 xyxy, pixels of the padded input
    labels: np.ndarray  # [N] int
    image_index: np.ndarray  # [N] int: the image of each box
    input_sizes: np.ndarray  # [N, 2] height and width of the box's image, resized and padded, pixels
    scales: np.ndarray  # [N] resized size / original size of the box's image

    @property
    def sides(self) -> np.ndarray:
        """[N] the square root of the area, pixels after resizing."""
        return np.sqrt((self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1))


def resized_boxes(dataset: DetectionDataset, min_side: int, max_side: int) -> Boxes:
    """All boxes of a data set, resized as by Resizer; only the sizes of the images are read."""
    sizes = dataset.image_sizes
    resized = [resized_size(*size, min_side, max_side) for size in sizes.tolist()]
    scales = np.array([scale for scale, _, _ in resized])
    padded = np.array([size for _, _, size in resized], dtype=np.int64).reshape(-1, 2)
    image_index = dataset.image_index
    # As in training, boxes are clipped to their images, and those of which nothing is left are dropped.
    boxes = dataset.annotations[:, :4].astype(np.float64).clip(0, np.tile(sizes[image_index, ::-1], 2))
    kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(axis=1)
    boxes, image_index = boxes[kept], image_index[kept]
    labels = dataset.annotations[kept, 4].astype(np.int64)
    scales = scales[image_index]
    return Boxes(boxes * scales[:, None], labels, image_index, padded[image_index], scales)


def best_ious(boxes: Boxes, anchors: Anchors) -> np.ndarray:
    """The IoU of each box with the anchor that overlaps it most, [N].

    The overlap with an anchor of a given shape only decreases as its centre moves away from the centre of the box, in x
    or in y. So on each level the nearest location is the best, and only its anchors are compared.
    """
    targets = torch.from_numpy(boxes.boxes)[:, None]  # [N, 1, 4]
    centres = (targets[..., :2] + targets[..., 2:]) / 2
    input_sizes = torch.from_numpy(boxes.input_sizes)[:, None].flip(2)  # [N, 1, 2] width, height
    best = torch.zeros(len(targets), dtype=torch.float64)
    for stride, cell in zip(anchors.strides, anchors.cells.cpu().double(), strict=True):
        last = (input_sizes / stride).ceil() - 1  # [N, 1, 2] column and row
        wanted = centres - (cell[:, :2] + cell[:, 2:]) / 2  # [N, num_anchors, 2]
        nearest = ((wanted / stride).floor().clamp(min=0).minimum(last) + 0.5) * stride
        iou = box_iou(nearest.repeat(1, 1, 2) + cell, targets)  # [N, num_anchors, 1]
        best = best.maximum(iou.amax(dim=(1, 2)))
    return best.numpy()


def smallest_side(anchors: Anchors) -> float:
    """The side of the smallest square box, pixels after resizing, that some anchor overlaps by an IoU of 0.5.

    The box is centred on an anchor of w x h; if it fits inside, IoU = side^2 / (w h).
    """
    sizes = (anchors.cells[..., 2:] - anchors.cells[..., :2]).reshape(-1, 2).double().cpu()  # [A, 2] width, height
    sides = torch.arange(0.1, float(sizes.max()), 0.1, dtype=torch.float64)
    squares = sides[:, None].repeat(1, 2)
    iou = box_iou(torch.cat([-squares, squares], dim=1), torch.cat([-sizes, sizes], dim=1))  # [sides, A]
    return float(sides[(iou >= FOREGROUND_IOU).any(dim=1)].min())


@dataclass
class AnchorFit:
    """How well anchors fit boxes."""

    boxes: Boxes
    anchors: Anchors
    iou: np.ndarray  # [N] the best IoU of each box
    needed_iou: float  # the IoU at which a box can be learned: 0.5, or less if training keeps each box's best anchor
    class_names: list[str]

    @property
    def unreachable(self) -> np.ndarray:
        """[N] bool: the boxes that can never be learned."""
        return self.iou < self.needed_iou

    @property
    def unreachable_share(self) -> float:
        """The share of boxes that can never be learned, from 0 to 1."""
        return float(self.unreachable.mean()) if len(self.iou) else 0.0

    def coverage(self, threshold: float, chosen: np.ndarray | slice = slice(None)) -> float:
        """Share of the chosen boxes that have an anchor of at least this IoU; NaN if no boxes are chosen."""
        iou = self.iou[chosen]
        return float((iou >= threshold).mean()) if len(iou) else math.nan

    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """Masks [N] of the boxes of each class and of each size, by name."""
        by_size = np.digitize(self.boxes.sides, SIZE_EDGES) - 1
        sizes = {
            f"{low:g}-{high:g} px" if high < math.inf else f"over {low:g} px": by_size == number
            for number, (low, high) in enumerate(itertools.pairwise(SIZE_EDGES))
        }
        classes = {name: self.boxes.labels == label for label, name in enumerate(self.class_names)}
        return {"class": classes, "side after resizing": sizes}


def measure(
    dataset: DetectionDataset, anchors: Anchors, min_side: int, max_side: int, best_match_iou: float | None = None
) -> AnchorFit:
    """Measure how well anchors fit the boxes of a data set, resized as by Resizer; `best_match_iou` as in FocalLoss."""
    boxes = resized_boxes(dataset, min_side, max_side)
    needed = FOREGROUND_IOU if best_match_iou is None else min(FOREGROUND_IOU, best_match_iou)
    return AnchorFit(boxes, anchors, best_ious(boxes, anchors), needed, list(dataset.labels.values()))


def search(fit: AnchorFit, seed: int = 0) -> AnchorFit:
    """Search for scales and ratios that fit the boxes better, as many as now, with the same sizes and strides.

    Uses differential evolution (Storn and Price, 1997) over the logarithms of the scales and ratios, starting from the
    current ones, on up to SEARCH_BOXES boxes; the result is measured on all boxes. The anchors found reach no fewer
    boxes; if none fit better, `fit` itself is returned.
    """
    from scipy.optimize import differential_evolution  # slow to import

    now = fit.anchors
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(fit.iou))[:SEARCH_BOXES]
    sample = Boxes(*(values[chosen] for values in fit.boxes))
    num_scales = len(now.scales)

    def candidate(logs: np.ndarray) -> Anchors:
        values = np.exp(logs).round(3)
        scales, ratios = sorted(values[:num_scales].tolist()), sorted(values[num_scales:].tolist())
        return Anchors(now.pyramid_levels, now.strides, now.sizes, ratios, scales)

    def badness(logs: np.ndarray) -> float:
        iou = best_ious(sample, candidate(logs))
        return -((iou >= fit.needed_iou).mean() + 0.5 * iou.mean())  # reached boxes count most, then closeness

    bounds = [tuple(np.log(SEARCH_SCALES))] * num_scales + [tuple(np.log(SEARCH_RATIOS))] * len(now.ratios)
    start = np.log([*now.scales, *now.ratios]).clip(*np.array(bounds).T)
    found = differential_evolution(badness, bounds, x0=start, maxiter=40, popsize=6, seed=seed, polish=False)
    anchors = candidate(found.x)
    better = AnchorFit(fit.boxes, anchors, best_ious(fit.boxes, anchors), fit.needed_iou, fit.class_names)
    closer = better.iou.mean() - fit.iou.mean() >= WORTHWHILE_IOU and better.unreachable_share <= fit.unreachable_share
    return better if closer or better.unreachable_share < fit.unreachable_share else fit
