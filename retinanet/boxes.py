"""Box arithmetic: IoU, and the encoding of boxes as regression targets (RetinaNet, section 4, "Box Regression Subnet").

Boxes are xyxy, (x1, y1, x2, y2): pixels of the network's (padded) input, x to the right and y down, in
continuous coordinates, so that a box from 0 to 10 is 10 pixels wide.
"""

import math

import torch
from torch import Tensor, nn

# Regression targets are divided by these, so that each has a spread of about one (Fast R-CNN, section 2.3).
# Paper: silent (Detectron: 1, 1, 1, 1). Original: (0.1, 0.1, 0.2, 0.2). Here: the original's, because its
# checkpoints need them.
DELTA_STD = (0.1, 0.1, 0.2, 0.2)

# The largest dw and dh: they enlarge an anchor from 16 to 1000 pixels (Detectron's bound).
# Paper: silent (Detectron: clamped to this). Original: exp() without a bound. Here: clamped, because exp() otherwise
# overflows to infinity.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def box_intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area of the intersection of every box of one set with every box of the other.

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy; the leading dimensions broadcast.

    Returns:
        [..., N, M], square pixels; 0 where two boxes do not overlap.
    """
    ax1, ay1, ax2, ay2 = a.unsqueeze(-2).unbind(-1)  # each [..., N, 1]
    bx1, by1, bx2, by2 = b.unsqueeze(-3).unbind(-1)  # each [..., 1, M]
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp_(min=0)  # [..., N, M]
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp_(min=0)  # [..., N, M]
    return width.mul_(height)


def box_area(boxes: Tensor) -> Tensor:
    """Area of boxes: [..., 4] xyxy -> [...], square pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of one set with every box of the other.

    Args:
        a: [..., N, 4] xyxy.
        b: [..., M, 4] xyxy; the leading dimensions broadcast.

    Returns:
        [..., N, M], from 0 (disjoint) to 1 (identical).
    """
    intersection = box_intersection(a, b)
    union = (box_area(a).unsqueeze(-1) + box_area(b).unsqueeze(-2)).sub(intersection)
    return intersection.div_(union.clamp_(min=1e-8))


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[..., 4] xyxy -> centre x, centre y, width, height, each [...]."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def encode_boxes(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Turn boxes into regression targets; the inverse of `decode_boxes`.

    R-CNN's parameterisation (RetinaNet, section 4, "Box Regression Subnet"): how far the anchor's centre
    must move, in units of the anchor's size, and the logarithm of how much the anchor must grow.

    Args:
        anchors: [..., 4] xyxy, pixels of the padded input.
        boxes: [..., 4] xyxy: the box that each anchor should become.

    Returns:
        [..., 4] (dx, dy, dw, dh), dimensionless, in units of `DELTA_STD`.
    """
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors)
    x, y, width, height = _centre_and_size(boxes)
    # Paper: any size. Original: at least one pixel. Here: the original's, because log(0) is not finite.
    width, height = width.clamp(min=1), height.clamp(min=1)
    std_x, std_y, std_width, std_height = DELTA_STD
    return torch.stack(
        [
            (x - anchor_x) / anchor_width / std_x,
            (y - anchor_y) / anchor_height / std_y,
            torch.log(width / anchor_width) / std_width,
            torch.log(height / anchor_height) / std_height,
        ],
        dim=-1,
    )


def decode_boxes(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Turn regression outputs into boxes; the inverse of `encode_boxes`.

    A delta moves its anchor's centre by a fraction of the anchor's size and scales that size
    exponentially (R-CNN's parameterisation; RetinaNet, section 4, "Box Regression Subnet").

    Args:
        anchors: [..., 4] xyxy, pixels of the padded input.
        deltas: [..., 4] (dx, dy, dw, dh), dimensionless, in units of `DELTA_STD`.

    Returns:
        [..., 4] float32 xyxy, pixels of the padded input, not clipped.
    """
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_and_size(anchors)
    dx, dy, dw, dh = (delta * std for delta, std in zip(deltas.float().unbind(-1), DELTA_STD, strict=True))
    x = anchor_x + dx * anchor_width
    y = anchor_y + dy * anchor_height
    half_width = 0.5 * anchor_width * torch.exp(dw.clamp(max=MAX_LOG_SCALE))
    half_height = 0.5 * anchor_height * torch.exp(dh.clamp(max=MAX_LOG_SCALE))
    return torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], dim=-1)


def clip_boxes(boxes: Tensor, height: float, width: float) -> Tensor:
    """Clip boxes to an image.

    Args:
        boxes: [..., 4] xyxy, pixels.
        height: height of the image, pixels.
        width: width of the image, pixels.

    Returns:
        [..., 4]: x within [0, width], y within [0, height].
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Corners to corner and size, as in COCO's files: [..., 4] (x1, y1, x2, y2) -> (x1, y1, width, height)."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corner and size to corners: [..., 4] (x1, y1, width, height) -> (x1, y1, x2, y2)."""
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


class BBoxTransform(nn.Module):
    """`decode_boxes` as a module, with the original's interface.

    Args:
        mean: [4] added to the scaled deltas; 0 by default.
        std: [4] factors that scale the deltas; `DELTA_STD` by default.
    """

    def __init__(self, mean: Tensor | None = None, std: Tensor | None = None):
        super().__init__()
        self.mean = torch.as_tensor((0.0, 0.0, 0.0, 0.0) if mean is None else mean, dtype=torch.float32)
        self.std = torch.as_tensor(DELTA_STD if std is None else std, dtype=torch.float32)

    def forward(self, boxes: Tensor, deltas: Tensor) -> Tensor:
        """Anchors [..., 4] xyxy and deltas [..., 4] -> boxes [..., 4] xyxy."""
        scaled = deltas * self.std.to(deltas.device) + self.mean.to(deltas.device)
        return decode_boxes(boxes, scaled / scaled.new_tensor(DELTA_STD))


class ClipBoxes(nn.Module):
    """`clip_boxes` as a module, with the original's interface; as there, the constructor's arguments are unused."""

    def __init__(self, width: float | None = None, height: float | None = None):
        super().__init__()

    def forward(self, boxes: Tensor, img: Tensor) -> Tensor:
        """Clip boxes [..., 4] xyxy to images [B, 3, H, W]."""
        return clip_boxes(boxes, *img.shape[-2:])
