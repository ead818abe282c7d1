"""The weights of torchvision's RetinaNet -> the weights of this library's, with equal outputs."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from retinanet.anchors import RATIOS, Anchors, generate_anchors
from retinanet.boxes import DELTA_STD
from retinanet.errors import UserError

BN_EPS = 1e-5  # of nn.BatchNorm2d, here as there
TINY_EPS = 0.0  # torchvision runs its first COCO weights, and only those, with this one
NO_CLASS = ("__background__", "N/A")  # outputs that torchvision's COCO weights have but never use


def _new_name(name: str) -> str | None:
    """This library's name of one of torchvision's weights; None where there is none."""
    if name.startswith("backbone.body."):
        return name.removeprefix("backbone.body.")
    if match := re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.([012])(?:\.0)?\.(weight|bias)", name):
        return f"fpn.P{int(match[2]) + 3}_{1 if match[1] == 'inner' else 2}.{match[3]}"
    if match := re.fullmatch(r"backbone\.fpn\.extra_blocks\.p([67])\.(weight|bias)", name):
        return f"fpn.{'P6' if match[1] == '6' else 'P7_2'}.{match[2]}"
    if match := re.fullmatch(r"head\.(classification|regression)_head\.(.+)\.(weight|bias)", name):
        if match[2] in ("cls_logits", "bbox_reg"):
            return f"{match[1]}Model.output.{match[3]}"
        if layer := re.fullmatch(r"conv\.([0-3])\.0", match[2]):
            return f"{match[1]}Model.conv{int(layer[1]) + 1}.{match[3]}"
        if layer := re.fullmatch(r"conv\.([0246])", match[2]):  # before torchvision 0.14
            return f"{match[1]}Model.conv{int(layer[1]) // 2 + 1}.{match[3]}"
    return None


def _anchors() -> Anchors:
    """Reference boxes of torchvision: whole pixels, around the corner of a cell where ours are around its centre."""
    default = Anchors()
    cells = []
    for size, stride in zip(default.sizes, default.strides, strict=True):
        scales = [size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))]
        cells.append((generate_anchors(1, RATIOS, scales).round() - stride / 2).tolist())
    # torchvision's strides are input size / feature size: on P6 and P7 they are 64 and 128 pixels only where these
    # divide the input's sides. Here they always are, as in the paper.
    return Anchors(cells=cells)


def convert(path: str | Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a state dict of torchvision's RetinaNet.

    Args:
        path: for messages.
        state: of a model with any of the five ResNets, with P6 from C5 or P5, and with plain heads.

    Returns:
        The state dict of a RetinaNet of this library, and what is known of it: `found`, `class_names`, `anchors`,
        `min_side` and `max_side`.

    Raises:
        UserError: it has layers that this library's RetinaNet has not, such as the GroupNorm of torchvision's v2.
    """
    if any(re.fullmatch(r"head\..+\.conv\.\d\.1\.weight", name) for name in state):
        raise UserError(
            f"{path}: is torchvision's RetinaNet with normalised heads (retinanet_resnet50_fpn_v2), and this library's "
            "heads have no GroupNorm; the weights of retinanet_resnet50_fpn can be converted"
        )
    unknown = [name for name in state if _new_name(name) is None]
    if unknown:
        raise UserError(f"{path}: is no RetinaNet of torchvision that can be converted: it has {unknown[0]}")
    new = {_new_name(name): value for name, value in state.items()}

    # Ours regresses in units of DELTA_STD: the last layer is divided by them.
    for kind in ("weight", "bias"):
        key = f"regressionModel.output.{kind}"
        std = new[key].new_tensor(DELTA_STD).repeat(len(new[key]) // 4)  # [num_anchors * 4]
        new[key] = new[key] / std.reshape(-1, *[1] * (new[key].dim() - 1))

    anchors = _anchors()
    num_classes = len(new["classificationModel.output.bias"]) // anchors.num_anchors
    known = {
        "found": f"torchvision's RetinaNet with {num_classes} outputs",
        "anchors": anchors.settings(),
        "min_side": 800,
        "max_side": 1333,
    }
    coco_names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if num_classes == len(coco_names):
        used = [label for label, name in enumerate(coco_names) if name not in NO_CLASS]
        for kind in ("weight", "bias"):
            key = f"classificationModel.output.{kind}"
            new[key] = new[key].unflatten(0, (anchors.num_anchors, num_classes))[:, used].flatten(0, 1)
        known["class_names"] = [coco_names[label] for label in used]
        known["found"] += f", of which the {len(used)} of COCO's classes are kept"
        if "bn1.num_batches_tracked" not in new:
            _change_eps(new, TINY_EPS)
    return new, known


def _change_eps(state: dict[str, Tensor], eps: float) -> None:
    """Change the scales of all BatchNorms so that BN_EPS gives the outputs that `eps` gave."""
    for key in [key for key in state if key.endswith("running_var")]:
        variance = state[key].double()
        scale = key.replace("running_var", "weight")
        state[scale] = (state[scale] * ((variance + BN_EPS) / (variance + eps)).sqrt()).to(state[scale].dtype)
