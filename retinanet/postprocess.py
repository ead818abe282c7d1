"""From the network's outputs to detections (RetinaNet, section 4.1, "Inference")."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from retinanet.boxes import clip_boxes, decode_boxes

# Paper: at most 1000 boxes per level before NMS (Detectron: 100 per image after it). Original: no limits.
# Here: the paper's, because more boxes cost seconds and gain no AP; None means no limit, as in the original.
SCORE_THRESHOLD, NMS_THRESHOLD, TOP_K, MAX_DETECTIONS = 0.05, 0.5, 1000, 100


class Detections(NamedTuple):
    """The objects found in one image, best first.

    Attributes:
        scores: [N] float32, from 0 to 1.
        labels: [N] int64, 0-based.
        boxes: [N, 4] float32 xyxy, pixels.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def best_candidates(
    logits: Tensor, level_sizes: Sequence[int], score_threshold: float = SCORE_THRESHOLD, top_k: int | None = TOP_K
) -> Tensor:
    """The candidates of one image: (anchor, class) pairs above the threshold, at most the `top_k` best of each level.

    Args:
        logits: [A, K].
        level_sizes: number of anchors of each pyramid level; they sum to A.
        score_threshold: scores must be above it.
        top_k: candidates per level; None for all.

    Returns:
        [N] positions in `logits.flatten()`: anchor x K + class.
    """
    # A score is above the threshold exactly where its logit is above the threshold's logit.
    p = min(max(score_threshold, 0.0), 1.0)
    logit_threshold = math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)
    candidates, offset = [], 0
    for level in logits.split(list(level_sizes)):
        flat = level.flatten()
        found = (flat > logit_threshold).nonzero()[:, 0]
        if top_k is not None and len(found) > top_k:
            found = found[flat[found].topk(top_k).indices]
        candidates.append(found + offset)
        offset += len(flat)
    return torch.cat(candidates)


def select_detections(
    candidates: Tensor,
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    image_size: tuple[float, float],
    nms_threshold: float = NMS_THRESHOLD,
    max_detections: int | None = MAX_DETECTIONS,
) -> Detections:
    """Detections of one image: its candidates decoded and clipped, then NMS within each class.

    Args:
        candidates: [N] from `best_candidates`.
        logits: [A, K].
        deltas: [A, 4]; only those of candidates count.
        anchors: [A, 4] xyxy, pixels of the padded input.
        image_size: height and width, pixels, to which boxes are clipped.
        nms_threshold: of two boxes of a class with an IoU above this, the one with the higher score is kept.
        max_detections: number of detections to return; None for all.
    """
    anchor_index = candidates // logits.shape[-1]  # [N]
    boxes = clip_boxes(decode_boxes(anchors[anchor_index], deltas[anchor_index]), *image_size)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # boxes in the padding are clipped to lines
    candidates, boxes = candidates[inside], boxes[inside]
    scores = logits.flatten()[candidates].float().sigmoid()  # [N]
    labels = candidates % logits.shape[-1]
    kept = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return Detections(scores[kept], labels[kept], boxes[kept])
