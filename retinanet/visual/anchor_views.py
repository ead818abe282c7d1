"""Drawings of anchors: those of one location per level, those assigned to boxes, and the tiles of the box head."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from retinanet.anchors import Anchors
from retinanet.boxes import box_area, box_iou
from retinanet.data.report import counted
from retinanet.matcher import IGNORE, match_anchors
from retinanet.sparse_head import COST, MARGIN, TILE, Plan
from retinanet.visual.drawing import (
    Colour,
    class_colour,
    contact_sheet,
    draw_boxes,
    enlarge,
    fit_to_cell,
    legible_zoom,
    line_width,
    side_by_side,
)
from retinanet.visual.text import readable_names

RED = (255, 60, 60)  # boxes without a positive anchor; not the colour of any class
BLUE = (80, 130, 255)  # ignored anchors; visible on dark and on light backgrounds
RATIO_COLOURS = ((255, 153, 119), (0, 255, 0), (0, 255, 255))  # anchors of the first, second and third ratio
FRAME = 8  # pixels of margin around the image in drawings of anchors
CROWDED_SIDE = 600  # short side, pixels, to which images are enlarged so that many anchors are legible


def draw_matches(
    image: np.ndarray,
    annotations: np.ndarray,
    anchors: Tensor,
    class_names: Sequence[str],
    best_match_iou: float | None = None,
) -> np.ndarray:
    """Draw the positive anchors, each in the colour of its box, and in a second panel the ignored ones.

    The caption of a box has its number of positive anchors; a box without any is red and dotted. Annotations [G, 5]
    and anchors [A, 4] are in pixels of the image [H, W, 3], the network's input; `best_match_iou` is as in FocalLoss.
    """
    boxes, names = torch.as_tensor(annotations[:, :4]), readable_names(class_names)
    matches = match_anchors(anchors, torch.as_tensor(annotations)[None], best_match_iou)[0]  # [A]
    positive, ignored = (matches >= 0).nonzero()[:, 0], (matches == IGNORE).nonzero()[:, 0]
    counts = torch.bincount(matches[positive], minlength=len(boxes)).tolist()
    labels = annotations[:, 4].astype(int)
    captions = [
        f"{names[label]}: {count}" + ("" if count else f", best IoU {float(box_iou(box[None], anchors).max()):.2f}")
        for label, count, box in zip(labels, counts, boxes, strict=True)
    ]
    colours = [class_colour(index) if count else RED for index, count in enumerate(counts)]
    styles = ["solid" if count else "dotted" for count in counts]
    zoom = legible_zoom(image.shape[:2], captions, CROWDED_SIDE)
    positives = _outline(image, anchors[positive], [colours[row] for row in matches[positive].tolist()], zoom)
    others = _outline(image, anchors[ignored], [BLUE] * len(ignored), zoom)
    pictures = [
        draw_boxes(positives, boxes * zoom, labels, captions, styles, colours, zoom=1),
        draw_boxes(others, boxes * zoom, labels, None, styles, colours, zoom=1),
    ]
    reached = f"{np.count_nonzero(counts)} of {counted(len(boxes), 'box')}"
    background = len(anchors) - len(positive) - len(ignored)
    titles = [
        f"{counted(len(positive), 'positive anchor')}, for {reached}",
        f"{counted(len(ignored), 'ignored anchor')} (blue); the other {background} are background",
    ]
    return side_by_side(pictures, titles)


def _outline(image: np.ndarray, anchors: Tensor, colours: Sequence[Colour], zoom: int) -> np.ndarray:
    """Draw the outlines and centres of anchors on an enlarged image; the more anchors, the fainter the outlines."""
    opacity = max(20, min(120, 6000 // max(1, len(anchors))))
    picture = Image.fromarray(enlarge(image, zoom))
    # torchvision draws opaque lines only.
    canvas = ImageDraw.Draw(picture, "RGBA")
    radius = line_width(picture.size)
    for (x1, y1, x2, y2), colour in zip((anchors * zoom).tolist(), colours, strict=True):
        canvas.rectangle((x1, y1, x2, y2), outline=(*colour, opacity), width=max(1, radius // 2))
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=(0, 0, 0))
    return np.asarray(picture)


def draw_anchors(image: np.ndarray, annotations: np.ndarray, anchors: Anchors) -> np.ndarray:
    """Draw the anchors of one location per level: one panel per level, one colour per ratio, boxes white and dotted.

    The location is the one whose anchors overlap some box most, or the middle one if there are no boxes. Anchors may
    reach beyond the image, which then gets a grey margin. Annotations [G, 5] are in pixels of the image [H, W, 3].
    """
    height, width = image.shape[:2]
    boxes = torch.as_tensor(annotations[:, :4])
    shapes = anchors.level_shapes(height, width)
    levels = anchors.of_size(height, width).split(anchors.level_sizes(height, width))
    panels = []
    for level, stride, (rows, columns), of_level in zip(
        anchors.pyramid_levels, anchors.strides, shapes, levels, strict=True
    ):
        location = rows // 2 * columns + columns // 2
        if len(boxes):
            location = int(box_iou(boxes, of_level).amax(dim=0).argmax()) // anchors.num_anchors
        cells = of_level.reshape(-1, anchors.num_anchors, 4)[location]
        sides = " ".join(f"{side:.0f}" for side in box_area(cells).sqrt().round().unique())
        title = f"P{level}: {rows} x {columns} locations, every {stride} px; sides {sides} px"
        ratios = [number // len(anchors.scales) % len(RATIO_COLOURS) for number in range(len(cells))]
        panel = _draw_location(image, boxes, cells, [RATIO_COLOURS[ratio] for ratio in ratios])
        panels.append(side_by_side([panel], [title]))
    return contact_sheet(panels, columns=3)


def _draw_location(image: np.ndarray, boxes: Tensor, cells: Tensor, colours: Sequence[Colour]) -> np.ndarray:
    """Draw boxes and the anchors of a location on an image, with a margin for anchors that reach beyond it."""
    height, width = image.shape[:2]
    low = cells[:, :2].amin(dim=0).floor().clamp(max=-FRAME).int()  # x, y
    high = torch.maximum(cells[:, 2:].amax(dim=0).ceil().int(), torch.tensor([width + FRAME, height + FRAME]))
    (left, top), (right, bottom) = low.tolist(), high.tolist()
    canvas = np.full((bottom - top, right - left, 3), 90, dtype=np.uint8)
    canvas[-top : height - top, -left : width - left] = image
    canvas, scale = fit_to_cell(canvas)
    everything = (torch.cat([boxes, cells]) - low.repeat(2)) * scale
    styles = ["dotted"] * len(boxes) + ["solid"] * len(cells)
    colours = [(255, 255, 255)] * len(boxes) + list(colours)
    return draw_boxes(canvas, everything.numpy(), [0] * len(everything), None, styles, colours)


def draw_tiles(
    image: np.ndarray, annotations: np.ndarray, anchors: Anchors, best_match_iou: float | None = None
) -> np.ndarray:
    """Draw where training computes the box head, a panel per level: tiles bright, their margins dimmed, the rest dark.

    Annotations [G, 5] are in pixels of the image [H, W, 3], the network's input; `best_match_iou` is as in FocalLoss.
    """
    size, boxes = image.shape[:2], annotations[:, :4]
    matches = match_anchors(anchors.of_size(*size), torch.as_tensor(annotations)[None], best_match_iou)
    plan = Plan(matches >= 0, anchors.level_shapes(*size))
    panels = []
    levels = zip(anchors.pyramid_levels, anchors.strides, plan.levels, plan.tiles(), strict=True)
    for level, stride, active, tiles in levels:
        if tiles is None:
            light, share = np.ones(size), "computed as a whole"
        else:
            light, corners = np.full(size, 0.2), tiles[1].tolist()
            for margin, brightness in ((MARGIN, 0.5), (0, 1.0)):
                for corner in corners:
                    y, x = (slice(max(0, (at - margin) * stride), (at + TILE + margin) * stride) for at in corner)
                    light[y, x] = brightness
            share = f"{len(corners)} of {active.numel()} tiles, {len(corners) * COST / active.numel():.0%} of the cost"
        canvas, scale = fit_to_cell((image * light[:, :, None]).astype(np.uint8))
        drawn = draw_boxes(canvas, boxes * scale, annotations[:, 4].astype(int))
        panels.append(side_by_side([drawn], [f"P{level}: {share}"]))
    return contact_sheet(panels, columns=3)
