"""The loss, forward and backward, beside its plain form and beside torchvision's focal loss and matcher."""

import argparse

import torch
from networks import add_size_arguments
from side_by_side import make_parser, measure, parse, peak_memory, report
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from retinanet.anchors import Anchors
from retinanet.fused_loss import FusedFocalLoss
from retinanet.losses import FocalLoss


def make_inputs(args: argparse.Namespace, boxes: int) -> tuple[torch.Tensor, ...]:
    """Logits and deltas like those of a network early in training, anchors, and random boxes."""
    batch, device = args.batch, args.device
    anchors = Anchors()(torch.empty(1, 3, args.height, args.width, device=device))
    logits = (torch.randn(batch, anchors.shape[1], args.classes, device=device) - 4).requires_grad_()
    deltas = torch.randn(batch, anchors.shape[1], 4, device=device).requires_grad_()
    centre = torch.rand(batch, boxes, 2, device=device) * torch.tensor([args.width, args.height], device=device)
    side = 16 * 2 ** (5 * torch.rand(batch, boxes, 2, device=device))
    labels = torch.randint(0, args.classes, (batch, boxes, 1), device=device)
    return logits, deltas, anchors, torch.cat([centre - side / 2, centre + side / 2, labels], dim=-1)


def torchvisions(logits: torch.Tensor, anchors: torch.Tensor, annotations: torch.Tensor) -> torch.Tensor:
    """The class loss of torchvision's RetinaNet: its matcher and its focal loss (the box loss is not counted)."""
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    losses = []
    for image_logits, boxes in zip(logits, annotations, strict=True):
        matches = matcher(box_iou(boxes[:, :4], anchors[0]))
        foreground = matches >= 0
        target = torch.zeros_like(image_logits)
        target[foreground, boxes[matches[foreground], 4].long()] = 1
        valid = matches != matcher.BETWEEN_THRESHOLDS
        loss = sigmoid_focal_loss(image_logits[valid], target[valid], reduction="sum")
        losses.append(loss / max(1, int(foreground.sum())))
    return torch.stack(losses).mean()


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=5)
    add_size_arguments(parser, boxes=15)
    args = parse(parser)
    inputs, many = make_inputs(args, args.boxes), make_inputs(args, 200)

    def ours(criterion: FocalLoss, logits: torch.Tensor, deltas: torch.Tensor, *others: torch.Tensor) -> None:
        torch.autograd.grad(sum(criterion(logits, deltas, *others)), (logits, deltas))

    def theirs(logits: torch.Tensor, _: torch.Tensor, *others: torch.Tensor) -> None:
        torch.autograd.grad(torchvisions(logits, *others), logits)

    programs = {
        "ours": lambda: ours(FusedFocalLoss(), *inputs),
        "torchvision": lambda: theirs(*inputs),
        "ours, plain": lambda: ours(FocalLoss(), *inputs),
        "ours, 200 boxes": lambda: ours(FusedFocalLoss(), *many),
    }
    seconds = measure(programs, args.repeats, args.device)
    bounds = {("ours", "torchvision"): 0.2, ("ours, 200 boxes", "ours"): 200 / args.boxes}
    size = inputs[0].nbytes
    extra = {
        f"extra peak memory / logits, {name}": peak_memory(programs[name], args.device) / size for name in programs
    }
    title = f"loss of {args.batch} x {inputs[0].shape[1]} anchors x {args.classes} classes"
    report(title, seconds, bounds, args.json, **extra)


if __name__ == "__main__":
    main()
