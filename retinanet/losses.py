"""The focal loss, and the criterion that trains the network (RetinaNet, sections 3 and 4.1).

A one-stage detector classifies some hundred thousand anchors an image, and nearly all are easy background.
Each costs little, but together their cross entropy drowns that of the few objects. The focal loss

    FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t),    p_t = the probability given to the truth

scales the cross entropy by (1 - p_t)^gamma, so that an example stops to count once it is right: with
gamma = 2, one that is classified with p_t = 0.9 weighs 100 times less than under plain cross entropy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.boxes import encode_boxes
from retinanet.matcher import BACKGROUND, IGNORE, match_anchors

# Logits handled at a time. On a CPU all intermediate results of a chunk then stay in the cache.
CPU_CHUNK, GPU_CHUNK = 2**17, 2**25


def _foreground_rows(labels: Tensor) -> Tensor:
    """[B, A] -> [N] positions in `labels.flatten()` of at least all entries that are not negative."""
    if labels.device.type == "cpu":
        return (labels.flatten() >= 0).nonzero()[:, 0]
    # All positions: to count the foreground would make the host wait for the GPU.
    return torch.arange(labels.numel(), device=labels.device)


def _focal_terms(x: Tensor, alpha: float, gamma: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Focal loss of logits `x` whose truth is 0, and its derivative.

    With p = sigmoid(x) the cross entropy is ce = -log(1 - p) = softplus(x), so that

        FL = alpha p^gamma ce,    dFL/dx = gamma FL (1 - p) + alpha p^gamma p.

    By symmetry, a truth of 1 with logit x costs what a truth of 0 costs with logit -x.
    """
    p = torch.sigmoid(x)
    weight = p.pow(gamma).mul_(alpha)
    loss = F.softplus(x).mul_(weight)
    if not with_grad:
        return loss, None
    slope = loss * gamma
    torch.sub(slope, weight, out=weight)
    return loss, slope.addcmul_(p, weight, value=-1)


class _FocalLossSum(torch.autograd.Function):
    """Focal loss summed over the anchors and classes of each image, with its gradient in the same pass.

    Every logit is first treated as background, which nearly all are; the one logit of each foreground
    anchor that belongs to its class is corrected afterwards. So no one-hot target is ever made, and the
    only large tensor is the gradient, in the logits' own precision.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        num_classes = logits.shape[-1]
        with_grad = ctx.needs_input_grad[0]
        logits_of = logits.detach().reshape(-1, num_classes)  # [B * A, K]
        grad = torch.empty_like(logits_of) if with_grad else None
        anchor_loss = torch.empty(len(logits_of), device=logits.device)
        step = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // num_classes)
        for start in range(0, len(logits_of), step):
            chunk = slice(start, start + step)
            loss, slope = _focal_terms(logits_of[chunk].float(), 1 - alpha, gamma, with_grad)
            torch.sum(loss, dim=1, out=anchor_loss[chunk])
            if with_grad:
                grad[chunk] = slope

        rows = _foreground_rows(labels)  # [N]
        columns = labels.flatten()[rows]
        is_foreground = columns >= 0
        columns = columns.clamp(min=0)
        truth = logits_of[rows, columns].float()
        as_background, background_slope = _focal_terms(truth, 1 - alpha, gamma, with_grad)
        as_foreground, foreground_slope = _focal_terms(-truth, alpha, gamma, with_grad)
        anchor_loss[rows] += torch.where(is_foreground, as_foreground - as_background, 0)
        kept = labels != IGNORE
        if with_grad:
            slope = torch.where(is_foreground, -foreground_slope, background_slope)
            grad[rows, columns] = slope.to(grad.dtype)
            ctx.save_for_backward(kept)
            ctx.grad = grad.view_as(logits)
        return torch.where(kept, anchor_loss.view_as(labels), 0).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.grad is None:
            raise RuntimeError("the focal loss gives its gradient away: backward works once, also with retain_graph")
        (kept,) = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        return grad.mul_((kept * grad_output[:, None])[..., None]), None, None, None


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of each image, summed over anchors and classes (RetinaNet, section 3.2).

    Args:
        logits: [B, A, K], any floating type; computed in float32.
        labels: [B, A] int64: the class of a foreground anchor, or BACKGROUND, or IGNORE.
        alpha: weight of the foreground; the background's is 1 - alpha.
        gamma: how strongly easy examples are discounted; 0 gives the balanced cross entropy.

    Returns:
        [B] float32.
    """
    # Paper: on logits. Original: on probabilities clamped to [1e-4, 1 - 1e-4]. Here: on logits, because the
    # clamp leaves no gradient below a logit of -9.2, where training then sticks at a loss of 2.302.
    return _FocalLossSum.apply(logits, labels, alpha, gamma)


def box_loss(deltas: Tensor, targets: Tensor, beta: float = 1 / 9) -> Tensor:
    """Smooth L1 of each anchor, averaged over the four coordinates.

    Args:
        deltas: [N, 4] regression outputs.
        targets: [N, 4] from `encode_boxes`.
        beta: error below which the loss is quadratic, in units of `DELTA_STD`.

    Returns:
        [N] float32.
    """
    # Paper: summed over the four coordinates. Original: averaged over them. Here: the original's.
    return F.smooth_l1_loss(deltas.float(), targets, beta=beta, reduction="none").mean(dim=-1)


class FocalLoss(nn.Module):
    """The criterion: matches anchors to boxes, then scores classes and boxes.

    Args:
        alpha: weight of the foreground in the class loss.
        gamma: focusing parameter of the class loss.
        beta: where smooth L1 turns from a parabola into a line.
        best_match_iou: also train an anchor that is some box's best, if their IoU is at least this (the
            paper's rule; 0.4 in its authors' code). None, the original's choice, leaves it out.
    """

    def __init__(
        self, alpha: float = 0.25, gamma: float = 2.0, beta: float = 1 / 9, best_match_iou: float | None = None
    ):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        self.beta = beta
        self.best_match_iou = best_match_iou

    def per_image(
        self, classifications: Tensor, regressions: Tensor, anchors: Tensor, annotations: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Class loss and box loss of each image, [B] float32 each; the arguments are those of `forward`."""
        if annotations.shape[1] == 0:
            annotations = F.pad(annotations, (0, 0, 0, 1), value=-1.0)
        annotations = annotations.float()
        num_anchors = classifications.shape[1]
        matches = match_anchors(anchors[0], annotations, self.best_match_iou)  # [B, A]
        rows = _foreground_rows(matches)  # [N]
        image, anchor = rows // num_anchors, rows % num_anchors
        row_matches = matches.flatten()[rows]
        is_foreground = row_matches > BACKGROUND
        matched = annotations[image, row_matches.clamp(min=0)]  # [N, 5]
        labels = matches.flatten().index_copy(0, rows, torch.where(is_foreground, matched[:, 4].long(), row_matches))
        # Paper: the positives of each image. Original: the same, at least 1. Here: the original's.
        num_foreground = (matches > BACKGROUND).sum(dim=1).clamp(min=1)
        class_loss = focal_loss(classifications, labels.view_as(matches), self.alpha, self.gamma)

        deltas = regressions.reshape(-1, 4).index_select(0, rows)
        row_loss = box_loss(deltas, encode_boxes(anchors[0][anchor], matched[:, :4]), self.beta)  # [N]
        anchor_loss = row_loss.new_zeros(matches.numel())
        anchor_loss = anchor_loss.index_copy(0, rows, torch.where(is_foreground, row_loss, 0))
        return class_loss / num_foreground, anchor_loss.view_as(matches).sum(dim=1) / num_foreground

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
        """
        class_loss, box_loss_ = self.per_image(classifications, regressions, anchors, annotations)
        return class_loss.mean(dim=0, keepdim=True), box_loss_.mean(dim=0, keepdim=True)
