"""Which ground-truth box each anchor must find: one integer an anchor (RetinaNet, section 4, "Anchors").

An anchor is assigned to the box that it overlaps most, if that IoU is at least 0.5; it is background
below 0.4; between the two it is ignored, for it would be a half-right example of either.
"""

import torch
from torch import Tensor

from retinanet.boxes import box_iou

BACKGROUND = -1
IGNORE = -2

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.4

# IoU matrices are made for this many numbers at a time. On a CPU they then stay in the cache.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**25


def match_anchors(anchors: Tensor, annotations: Tensor, best_match_iou: float | None = None) -> Tensor:
    """Assign every anchor to a box, to the background, or to neither.

    Args:
        anchors: [A, 4] xyxy, pixels.
        annotations: [B, G, 5] (x1, y1, x2, y2, label), pixels; rows with label -1 are padding.
        best_match_iou: also keep an anchor that overlaps some box more than any other anchor does, if that
            IoU is at least this; None turns the rule off.

    Returns:
        [B, A] int64: the row of `annotations`, or BACKGROUND, or IGNORE.
    """
    batch, num_boxes = annotations.shape[:2]
    anchors = anchors.t().contiguous().t()  # each coordinate in one piece of memory
    best_iou = anchors.new_zeros(batch, len(anchors))
    matches = torch.zeros(batch, len(anchors), dtype=torch.int64, device=anchors.device)
    is_best = torch.zeros_like(matches, dtype=torch.bool)
    chunk = CPU_CHUNK if anchors.device.type == "cpu" else GPU_CHUNK
    step = max(1, chunk // max(1, batch * len(anchors)))
    for start in range(0, num_boxes, step):
        rows = annotations[:, start : start + step]
        iou = box_iou(rows[:, :, :4], anchors)  # [B, rows, A]
        iou.masked_fill_(rows[:, :, 4:] < 0, 0)
        chunk_iou, chunk_matches = iou.max(dim=1)  # [B, A]
        better = chunk_iou > best_iou
        best_iou = torch.where(better, chunk_iou, best_iou)
        matches = torch.where(better, chunk_matches + start, matches)
        if best_match_iou is not None:
            box_best = iou.amax(dim=2, keepdim=True).clamp_(min=best_match_iou)  # [B, rows, 1]
            is_best |= ((iou >= box_best) & (iou > 0)).any(dim=1)
    # Paper: an anchor that is some box's best is kept too (RPN's rule; Detectron: from IoU 0.4 on).
    # Original: not kept. Here: the original's, unless `best_match_iou` asks for the paper's.
    foreground = (best_iou >= FOREGROUND_IOU) | is_best
    matches = torch.where(foreground, matches, IGNORE)
    return torch.where((best_iou < BACKGROUND_IOU) & ~foreground, BACKGROUND, matches)
