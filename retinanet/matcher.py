"""Which ground-truth box each anchor must find, as one integer per anchor (RetinaNet, section 4, "Anchors").

"Specifically, anchors are assigned to ground-truth object boxes using an intersection-over-union (IoU) threshold of
0.5; and to background if their IoU is in [0, 0.4). [...] If an anchor is unassigned, which may happen with overlap in
[0.4, 0.5), it is ignored during training": it overlaps too much to be background, and too little to be an object.
"""

import torch
from torch import Tensor

from retinanet.boxes import box_iou

BACKGROUND = -1
IGNORE = -2

FOREGROUND_IOU = 0.5
BACKGROUND_IOU = 0.4

# IoUs are computed in chunks of at most this many, because on a CPU such a chunk stays in the cache.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**25


def match_anchors(anchors: Tensor, annotations: Tensor, best_match_iou: float | None = None) -> Tensor:
    """Assign every anchor to a box, to the background, or to neither.

    Args:
        anchors: [A, 4] xyxy, pixels.
        annotations: [B, G, 5] (x1, y1, x2, y2, label), pixels; rows with label -1 are padding.
        best_match_iou: also assign an anchor that has the highest IoU of all anchors with some box, if that IoU is
            at least this; None turns the rule off.

    Returns:
        [B, A] int64: the row of `annotations`, or BACKGROUND, or IGNORE.
    """
    best_iou, best_box, is_best = _best_overlaps(anchors, annotations, best_match_iou)
    # Paper: "the assignment rule from RPN", which also assigns an anchor that is some box's best (Detectron: if the
    # IoU is at least 0.4). Original: not assigned. Here: the original's, unless `best_match_iou` asks for the paper's.
    foreground = (best_iou >= FOREGROUND_IOU) | is_best
    background = (best_iou < BACKGROUND_IOU) & ~foreground
    return torch.where(foreground, best_box, torch.where(background, BACKGROUND, IGNORE))


def _best_overlaps(anchors: Tensor, annotations: Tensor, best_match_iou: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """For each anchor its highest IoU, the row of that box, and whether the anchor is some box's best; [B, A] each.

    Boxes are processed in chunks, because the [B, G, A] IoUs of a crowded image do not fit into memory.
    """
    batch, num_boxes = annotations.shape[:2]
    anchors = anchors.t().contiguous().t()  # makes each coordinate contiguous in memory
    best_iou = anchors.new_zeros(batch, len(anchors))
    best_box = torch.zeros(batch, len(anchors), dtype=torch.int64, device=anchors.device)
    is_best = torch.zeros_like(best_box, dtype=torch.bool)
    chunk = CPU_CHUNK if anchors.device.type == "cpu" else GPU_CHUNK
    step = max(1, chunk // max(1, batch * len(anchors)))
    for start in range(0, num_boxes, step):
        rows = annotations[:, start : start + step]
        iou = box_iou(rows[:, :, :4], anchors)  # [B, rows, A]
        iou.masked_fill_(rows[:, :, 4:] < 0, 0)
        chunk_iou, chunk_box = iou.max(dim=1)  # [B, A]
        better = chunk_iou > best_iou
        best_iou = torch.where(better, chunk_iou, best_iou)
        best_box = torch.where(better, chunk_box + start, best_box)
        if best_match_iou is not None:
            # A box whose highest IoU is below the limit has no best anchor: no IoU reaches the clamped value.
            highest = iou.amax(dim=2, keepdim=True).clamp_(min=best_match_iou)  # [B, rows, 1]
            is_best |= ((iou >= highest) & (iou > 0)).any(dim=1)
    return best_iou, best_box, is_best
