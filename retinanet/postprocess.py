"""From the network's outputs to detections (RetinaNet, section 4.1, "Inference")."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from retinanet.boxes import clip_boxes, decode_boxes

# Paper: at most 1000 boxes a level before NMS; Detectron: 100 an image after it. Original: no limits.
# Here: the paper's, because the rest costs seconds and no AP; None in their place gives the original's set.
SCORE_THRESHOLD, NMS_THRESHOLD, TOP_K, MAX_DETECTIONS = 0.05, 0.5, 1000, 100


class Detections(NamedTuple):
    """What was found in one image, best first.

    Attributes:
        scores: [N] float32, from 0 to 1.
        labels: [N] int64, 0-based.
        boxes: [N, 4] float32 xyxy, pixels.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def _best_candidates(logits: Tensor, logit_threshold: float, top_k: int | None) -> Tensor:
    """[A, K] of one level -> [N] flat indices of the logits above the threshold, the `top_k` best of them."""
    flat = logits.flatten()
    candidates = (flat > logit_threshold).nonzero()[:, 0]
    if top_k is not None and len(candidates) > top_k:
        candidates = candidates[flat[candidates].topk(top_k).indices]
    return candidates


def select_detections(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    level_sizes: Sequence[int],
    image_size: tuple[float, float],
    score_threshold: float = SCORE_THRESHOLD,
    nms_threshold: float = NMS_THRESHOLD,
    top_k: int | None = TOP_K,
    max_detections: int | None = MAX_DETECTIONS,
) -> Detections:
    """Detections of one image: the best candidates of each level, decoded, then NMS within each class.

    Args:
        logits: [A, K].
        deltas: [A, 4].
        anchors: [A, 4] xyxy, pixels of the padded input.
        level_sizes: number of anchors of each pyramid level; they sum to A.
        image_size: height and width, pixels, at which boxes are clipped.
        score_threshold: scores must be above it.
        nms_threshold: of two boxes of a class that overlap by more than this IoU, the better one stays.
        top_k: candidates of each level that are decoded; None for all.
        max_detections: detections of the image that are returned; None for all.
    """
    num_classes = logits.shape[-1]
    logit_threshold = torch.logit(torch.tensor(score_threshold, dtype=torch.float64).clamp(0, 1)).item()
    candidates, offset = [], 0
    for level_logits in logits.split(list(level_sizes)):
        candidates.append(_best_candidates(level_logits, logit_threshold, top_k) + offset)
        offset += level_logits.numel()
    candidates = torch.cat(candidates)
    anchor_index = candidates // num_classes  # [N]
    boxes = clip_boxes(decode_boxes(anchors[anchor_index], deltas[anchor_index]), *image_size)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # not wholly in the padding, where clipping leaves a line
    candidates, boxes = candidates[inside], boxes[inside]
    scores = logits.flatten()[candidates].float().sigmoid()  # [N]
    labels = candidates % num_classes
    kept = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return Detections(scores[kept], labels[kept], boxes[kept])
