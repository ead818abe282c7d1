"""The focal loss and its gradient in one pass: the same numbers as `losses.FocalLoss`, several times as fast.

The plain form creates a dozen tensors of the logits' size. Here every logit is first treated as background, as nearly
all are, in chunks whose intermediate results stay in the processor's cache. Then the result is corrected for one logit
per positive anchor: that of its class. So there is no one-hot target, and the only large tensor is the gradient.
`tests/test_fused_loss.py` checks that both forms agree.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retinanet.boxes import encode_boxes
from retinanet.losses import FocalLoss, smooth_l1
from retinanet.matcher import IGNORE

# Logits per chunk. On a CPU, all intermediate results of a chunk then stay in the cache.
CPU_CHUNK, GPU_CHUNK = 2**17, 2**25


def positive_rows(labels: Tensor) -> Tensor:
    """[B, A] labels -> [N] positions in `labels.flatten()`: those of all positive anchors, and perhaps of others."""
    if labels.device.type == "cpu":
        return (labels.flatten() >= 0).nonzero()[:, 0]
    # All positions, because selecting the positive ones would make the host wait for the device.
    return torch.arange(labels.numel(), device=labels.device)


def _focal_terms(x: Tensor, alpha: float, gamma: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Focal loss of logits `x` whose label is 0, and its derivative.

    With p = sigmoid(x) the cross entropy is ce = -log(1 - p) = softplus(x), so that

        FL = alpha p^gamma ce,    dFL/dx = gamma FL (1 - p) + alpha p^gamma p.

    By symmetry, the loss of label 1 and logit x is that of label 0 and logit -x.
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
    """Focal loss summed over the anchors and classes of each image, with its gradient in the same pass."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        num_classes = logits.shape[-1]
        with_grad = ctx.needs_input_grad[0]
        logits_of = logits.detach().reshape(-1, num_classes)  # [B * A, K]
        # Small gradients underflow in float16, and a gradient scaler enlarges them only in the backward pass.
        dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty_like(logits_of, dtype=dtype) if with_grad else None
        anchor_loss = torch.empty(len(logits_of), dtype=torch.float32, device=logits.device)
        step = max(1, (CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK) // num_classes)
        for start in range(0, len(logits_of), step):
            chunk = slice(start, start + step)
            loss, slope = _focal_terms(logits_of[chunk].float(), 1 - alpha, gamma, with_grad)
            torch.sum(loss, dim=1, out=anchor_loss[chunk])
            if with_grad:
                grad[chunk] = slope

        rows = positive_rows(labels)  # [N]
        columns = labels.flatten()[rows]
        is_positive = columns >= 0
        columns = columns.clamp(min=0)
        truth = logits_of[rows, columns].float()
        as_background, background_slope = _focal_terms(truth, 1 - alpha, gamma, with_grad)
        as_positive, positive_slope = _focal_terms(-truth, alpha, gamma, with_grad)
        anchor_loss[rows] += torch.where(is_positive, as_positive - as_background, 0)
        kept = labels != IGNORE
        if with_grad:
            slope = torch.where(is_positive, -positive_slope, background_slope)
            grad[rows, columns] = slope.to(grad.dtype)
            ctx.save_for_backward(kept)
            ctx.grad, ctx.dtype = grad.view_as(logits), logits.dtype
        return torch.where(kept, anchor_loss.view_as(labels), 0).sum(dim=1)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.grad is None:
            raise RuntimeError("backward can run only once through the fused focal loss, even with retain_graph=True")
        (kept,) = ctx.saved_tensors
        grad, ctx.grad = ctx.grad, None
        return grad.mul_((kept * grad_output[:, None])[..., None]).to(ctx.dtype), None, None, None


def fused_focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss of each image, summed over its anchors and classes.

    Args:
        logits: [B, A, K], any floating type; computed in float32.
        labels: [B, A] int64: the class of a positive anchor, or BACKGROUND, or IGNORE.
        alpha: as in `losses.focal_loss`.
        gamma: as in `losses.focal_loss`.

    Returns:
        [B] float32: `focal_loss(logits, labels, alpha, gamma).sum(dim=1)`. Backward can run only once.
    """
    return _FocalLossSum.apply(logits, labels, alpha, gamma)


class FusedFocalLoss(FocalLoss):
    """`FocalLoss` with the fused class loss and, on a CPU, smooth L1 computed for the positive anchors only."""

    def class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As `FocalLoss.class_loss`."""
        return fused_focal_loss(logits, labels, self.alpha, self.gamma)

    def box_loss(self, deltas: Tensor, anchors: Tensor, labels: Tensor, boxes: Tensor) -> Tensor:
        """As `FocalLoss.box_loss`."""
        rows = positive_rows(labels)  # [N]
        targets = encode_boxes(anchors[0][rows % labels.shape[1]], boxes.reshape(-1, 4)[rows])
        loss = smooth_l1(deltas.reshape(-1, 4).index_select(0, rows), targets, self.beta)  # [N]
        loss = torch.where(labels.flatten()[rows] >= 0, loss, 0)
        anchor_loss = loss.new_zeros(labels.numel()).index_copy(0, rows, loss)
        return anchor_loss.view_as(labels).sum(dim=1)
