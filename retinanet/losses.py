"""The focal loss, and the criterion that trains the network (RetinaNet, sections 3 and 4.1).

A one-stage detector classifies about a hundred thousand anchors per image, and nearly all of them are easy background.
Each costs little, but together their cross entropy outweighs that of the few objects. The focal loss

    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t),    p_t = the predicted probability of the true label    (equation 5)

scales the cross entropy by (1 - p_t)^gamma, so that an example counts less and less once it is right: with
gamma = 2, "an example classified with p_t = 0.9 would have 100x lower loss compared with CE".

This file follows the paper literally. Training uses `fused_loss.FusedFocalLoss`, which computes the same numbers in one
pass over the logits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.boxes import box_iou as calc_iou  # noqa: F401, the name that the original's scripts import
from retinanet.boxes import encode_boxes
from retinanet.matcher import IGNORE, match_anchors


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss of each anchor, summed over the classes (RetinaNet, section 3.2).

    Every class of every anchor is a separate binary decision, and p_t is p if y = 1, 1 - p otherwise (equation 2).
    With logits, p_t = sigmoid(x_t), where x_t is x if y = 1, -x otherwise.

    Args:
        logits: [..., K] x, any floating type; computed in float32.
        labels: [...] int64: the class of a positive anchor, or BACKGROUND, or IGNORE.
        alpha: weight of the positive decisions; that of the negative ones is 1 - alpha.
        gamma: how strongly easy examples are discounted; 0 gives the alpha-balanced cross entropy.

    Returns:
        [...] float32; 0 for ignored anchors.
    """
    # Paper: on logits. Original: on probabilities clamped to [1e-4, 1 - 1e-4]. Here: on logits, because the
    # clamp leaves no gradient below a logit of -9.2, where training then sticks at a loss of 2.302 = -0.25 log(1e-4).
    logits = logits.float()
    y = (labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)).float()  # [..., K], one-hot
    x_t = (2 * y - 1) * logits
    p_t = torch.sigmoid(x_t)
    alpha_t = alpha * y + (1 - alpha) * (1 - y)
    loss = -alpha_t * (1 - p_t) ** gamma * F.logsigmoid(x_t)  # log(p_t)
    return torch.where(labels == IGNORE, 0, loss.sum(dim=-1))


def smooth_l1(deltas: Tensor, targets: Tensor, beta: float = 1 / 9) -> Tensor:
    """Smooth L1 of each anchor, averaged over the four coordinates (Fast R-CNN, equation 3).

    Args:
        deltas: [..., 4] regression outputs.
        targets: [..., 4] from `encode_boxes`.
        beta: error at which the loss changes from quadratic to linear, in units of the targets.

    Returns:
        [...] float32.
    """
    # Paper: summed over the four coordinates. Original: averaged over them. Here: the original's.
    return F.smooth_l1_loss(deltas.float(), targets, beta=beta, reduction="none").mean(dim=-1)


def check_annotations(annotations: Tensor, num_classes: int) -> None:
    """Check that annotations are [B, G, 5]; on the CPU, also that labels are classes and boxes are finite.

    Raises:
        ValueError: a check fails.
    """
    if annotations.dim() != 3 or annotations.shape[2] != 5:
        raise ValueError(f"annotations must be [B, G, 5] (x1, y1, x2, y2, label), not {list(annotations.shape)}")
    if annotations.device.type != "cpu":  # on a GPU, every step would wait for the result
        return
    labels = annotations[..., 4].float()
    wrong = (labels != -1) & ~((labels >= 0) & (labels < num_classes) & (labels % 1 == 0))
    if wrong.any():
        raise ValueError(f"annotations have label {labels[wrong][0]:g}, but the classes are 0 to {num_classes - 1}")
    if not annotations[labels >= 0].isfinite().all():
        raise ValueError("annotations have a box whose coordinates are not finite")


class FocalLoss(nn.Module):
    """The criterion: it assigns anchors to boxes, then computes the class loss and the box loss.

    Args:
        alpha: weight of the positive decisions in the class loss.
        gamma: focusing parameter of the class loss.
        beta: error at which smooth L1 changes from quadratic to linear.
        best_match_iou: an anchor that is some box's best is positive, too, if their IoU is at least this (RPN's rule,
            which the paper refers to; 0.4 in its authors' code). None, the original's choice, turns the rule off.
    """

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, beta: float = 1 / 9, best_match_iou: float | None = None
    ):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.best_match_iou = best_match_iou

    def assign(self, anchors: Tensor, annotations: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Step 1: what each anchor must find.

        Args:
            anchors: [1, A, 4] xyxy, pixels.
            annotations: [B, G, 5] (x1, y1, x2, y2, label), pixels; rows of -1 are padding.
            num_classes: K.

        Returns:
            Labels [B, A] int64 (a class, or BACKGROUND, or IGNORE) and boxes [B, A, 4] xyxy (meaningless where the
            label is not a class).

        Raises:
            ValueError: as in `check_annotations`.
        """
        check_annotations(annotations, num_classes)
        annotations = annotations.float()
        if annotations.shape[1] == 0:
            annotations = F.pad(annotations, (0, 0, 0, 1), value=-1.0)  # a row for `gather` to read
        matches = match_anchors(anchors[0], annotations, self.best_match_iou)  # [B, A]
        rows = matches.clamp(min=0)[..., None].expand(-1, -1, 5)
        matched = annotations.gather(1, rows)  # [B, A, 5]
        return torch.where(matches >= 0, matched[..., 4].long(), matches), matched[..., :4]

    def class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The focal loss of each image, summed over its anchors: [B, A, K], [B, A] -> [B]."""
        return focal_loss(logits, labels, self.alpha, self.gamma).sum(dim=1)

    def box_loss(self, deltas: Tensor, anchors: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """Smooth L1 of each image, summed over its positive anchors -> [B]; arguments as in `assign`."""
        loss = smooth_l1(deltas, encode_boxes(anchors, boxes), self.beta)  # [B, A]
        return torch.where(labels >= 0, loss, 0).sum(dim=1)

    def of_assigned(
        self, classifications: Tensor, regressions: Tensor, anchors: Tensor, labels: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Step 2: class loss and box loss of each image, [B] float32 each; labels and boxes come from `assign`."""
        # Paper: the positives of each image. Original: the same, at least 1. Here: the original's.
        num_positive = (labels >= 0).sum(dim=1).clamp(min=1)
        class_loss = self.class_loss(classifications, labels) / num_positive
        return class_loss, self.box_loss(regressions, anchors, labels, boxes) / num_positive

    def forward(
        self, classifications: Tensor, regressions: Tensor, anchors: Tensor, annotations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both losses, averaged over the images of the batch.

        Args:
            classifications: [B, A, K] logits.
            regressions: [B, A, 4] deltas.
            anchors: [1, A, 4] xyxy, pixels of the padded input.
            annotations: [B, G, 5] (x1, y1, x2, y2, label), pixels; rows of -1 are padding.

        Returns:
            Class loss and box loss, each of shape [1], float32.

        Raises:
            ValueError: as in `check_annotations`.
        """
        labels, boxes = self.assign(anchors, annotations, classifications.shape[-1])
        class_loss, box_loss = self.of_assigned(classifications, regressions, anchors, labels, boxes)
        return class_loss.mean(dim=0, keepdim=True), box_loss.mean(dim=0, keepdim=True)
