"""Convert weights of other programs to weights of this library's RetinaNet with equal outputs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from retinanet.anchors import RATIOS, Anchors, generate_anchors
from retinanet.boxes import DELTA_STD
from retinanet.errors import UserError, shown
from retinanet.model import PyramidFeatures

CLASS_HEAD = ("classificationModel.output.weight", "classificationModel.output.bias")  # the last layers of both heads
BOX_HEAD = ("regressionModel.output.weight", "regressionModel.output.bias")
BN_EPS = 1e-5  # of nn.BatchNorm2d, in this library and in torchvision
MAX_PARTS = 10_000  # modules and tensors of a pickled model
MAX_PREFIXES = 4  # nested prefixes of names, such as DataParallel's `module.`
NO_CLASS = ("__background__", "N/A")  # outputs that torchvision's COCO weights have but never use

# The classes that make up a whole pickled model of the original or of this library; no others are allowed.
PICKLED_CLASSES = {
    "model": "ResNet RetinaNet PyramidFeatures RegressionModel ClassificationModel",
    "resnet": "BasicBlock Bottleneck",
    "utils": "BasicBlock Bottleneck BBoxTransform ClipBoxes",
    "boxes": "BBoxTransform ClipBoxes",
    "anchors": "Anchors",
    "losses": "FocalLoss",
    "fused_loss": "FusedFocalLoss",
    "training.foreign_weights": "CellAnchors PyramidFromP5",
    "torch.nn.modules.conv": "Conv2d",
    "torch.nn.modules.batchnorm": "BatchNorm2d",
    "torch.nn.modules.activation": "ReLU Sigmoid",
    "torch.nn.modules.pooling": "MaxPool2d",
    "torch.nn.modules.upsampling": "Upsample",
    "torch.nn.modules.container": "Sequential",
    "torch.nn.parallel.data_parallel": "DataParallel",
    "numpy": "ndarray dtype",  # the original's anchors hold arrays
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
}


class StandIn:
    """Replaces a class of a pickled model: it keeps the object's state, and runs no code."""

    def __init__(self, *args: Any):
        pass

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


STAND_INS = [
    type(name, (StandIn,), {"__module__": prefix + module})
    for module, names in PICKLED_CLASSES.items()
    for name in names.split()
    for prefix in (("",) if module.startswith(("torch", "numpy")) else ("", "retinanet."))
]


class CellAnchors(Anchors):
    """Anchors that are given one by one, for a library that rounds its anchors or centres them elsewhere.

    `cells` are [levels, num_anchors, 4] xyxy, pixels, relative to the centre of a location.
    """

    def __init__(self, cells: Sequence[Sequence[Sequence[float]]]):
        super().__init__()
        self.explicit = {"cells": cells}
        self.cells = torch.tensor(cells, dtype=torch.float32, device="cpu")
        if self.cells.dim() != 3 or self.cells.shape[::2] != (len(self.strides), 4) or not self.cells.isfinite().all():
            raise ValueError("anchors must be finite, 4 numbers each, on five levels")

    def settings(self) -> dict[str, list]:
        """The argument of `make_anchors`, so that a checkpoint can carry it."""
        return super().settings() | self.explicit


def make_anchors(settings: Mapping[str, list]) -> Anchors:
    """The anchors of a checkpoint's `settings()`; the default ones for no settings."""
    if "cells" in settings:
        return CellAnchors(settings["cells"])
    numbers = [number for values in settings.values() for number in values]
    if len(numbers) > 1000 or not all(0 < number < 1e5 for number in numbers):
        raise ValueError("anchors")
    return Anchors(**settings)


class PyramidFromP5(PyramidFeatures):
    """The pyramid of torchvision's first RetinaNet, which computes P6 from P5 instead of C5."""

    def __init__(self, c3_channels: int, c4_channels: int, c5_channels: int, feature_size: int = 256):
        super().__init__(c3_channels, c4_channels, c5_channels, feature_size)
        self.P6 = nn.Conv2d(feature_size, feature_size, kernel_size=3, stride=2, padding=1)

    def p6_input(self, c5: Tensor, p5: Tensor) -> Tensor:
        """P5."""
        return p5


def read(path: str | Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Find the weights in the `content` that `checkpoint.load` read from `path`.

    They may be a state dict, possibly inside a dict or with DataParallel's prefix, or a whole pickled model; anything
    else is a UserError. Returns the weights under this library's names, and the model's info: always `found` (the kind
    of file), and `class_names`, `anchors`, `min_side` and `max_side` where they can be derived.
    """
    info: dict[str, Any] = {"found": "a state dict"}
    if isinstance(content, StandIn):
        info["found"] = "a whole pickled model, of which only the weights were read"
        state, info["anchors"] = _module_state(content), _module_anchors(content)
    elif isinstance(content, dict):
        inside = {name: value for name, value in content.items() if _is_state_dict(value)}
        usual = [inside[name] for name in ("state_dict", "model") if name in inside]
        guesses = usual[:1] or list(inside.values())
        state = guesses[0] if len(guesses) == 1 else content
    else:
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    if not _is_state_dict(state):
        raise UserError(f"{path}: holds something other than the weights of a model: {shown(list(state))}")
    for _ in range(MAX_PREFIXES):
        if all("." in key for key in state) and len({key.partition(".")[0] for key in state}) == 1:
            state = {key.partition(".")[2]: value for key, value in state.items()}
    if "backbone.body.conv1.weight" in state:
        return convert_torchvision(path, state)
    return state, info


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())


def _module_state(module: StandIn) -> dict[str, Tensor]:
    """The state dict of a pickled model; ValueError for too many parts, such as one module referenced endlessly."""
    state, waiting = {}, [("", module)]
    for _ in range(MAX_PARTS):
        prefix, module = waiting.pop()
        parts = module.state
        transient = set(parts.get("_non_persistent_buffers_set", ()))
        tensors = {**parts["_parameters"], **{k: v for k, v in parts["_buffers"].items() if k not in transient}}
        state |= {prefix + key: value.detach() for key, value in tensors.items() if value is not None}
        waiting += [(prefix + name + ".", child) for name, child in parts["_modules"].items() if child is not None]
        if not waiting:
            return state
        if len(state) + len(waiting) + len(prefix) > MAX_PARTS:
            break
    raise ValueError(f"more than {MAX_PARTS} parts")


def _module_anchors(module: StandIn) -> dict[str, list]:
    """The anchor settings of a pickled model of this library; {} for the original's, whose anchors are the default."""
    anchors = module.state["_modules"].get("module", module).state["_modules"]["anchors"].state
    settings = {key: anchors.get(key) for key in Anchors().settings()} | anchors.get("explicit", {})
    return settings if all(isinstance(value, list) for value in settings.values()) else {}


def _new_name(name: str) -> str | None:
    """This library's name for one of torchvision's weights; None if there is no such weight here."""
    if name.startswith("backbone.body."):
        return name.removeprefix("backbone.body.")
    if match := re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.([012])(?:\.0)?\.(weight|bias)", name):
        return f"fpn.P{int(match[2]) + 3}_{1 if match[1] == 'inner' else 2}.{match[3]}"
    if match := re.fullmatch(r"backbone\.fpn\.extra_blocks\.p([67])\.(weight|bias)", name):
        return f"fpn.{'P6' if match[1] == '6' else 'P7_2'}.{match[2]}"
    if match := re.fullmatch(r"head\.(classification|regression)_head\.(.+)\.(weight|bias)", name):
        if match[2] in ("cls_logits", "bbox_reg"):
            return f"{match[1]}Model.output.{match[3]}"
        if layer := re.fullmatch(r"conv\.([0-3])\.0|conv\.([0246])", match[2]):  # the second before torchvision 0.14
            index = int(layer[1]) if layer[1] else int(layer[2]) // 2
            return f"{match[1]}Model.conv{index + 1}.{match[3]}"
    return None


def torchvision_anchors() -> CellAnchors:
    """Torchvision's anchors: rounded to whole pixels, and centred on the corner of a cell instead of on its centre."""
    default = Anchors()
    cells = []
    for size, stride in zip(default.sizes, default.strides, strict=True):
        scales = [size, int(size * 2 ** (1 / 3)), int(size * 2 ** (2 / 3))]
        cells.append((generate_anchors(1, RATIOS, scales).round() - stride / 2).tolist())
    # torchvision's strides are input size / feature size, so on P6 and P7 they are 64 and 128 pixels only if these
    # divide the input's sides. Here they always are 64 and 128, as in the paper.
    return CellAnchors(cells)


def convert_torchvision(path: str | Path, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Convert a state dict of torchvision's RetinaNet on any of the five ResNets, with P6 from C5 or P5.

    Layers that this library's RetinaNet lacks, such as the GroupNorm of torchvision's v2, are a UserError.
    """
    if any(re.fullmatch(r"head\..+\.conv\.\d\.1\.weight", name) for name in state):
        raise UserError(
            f"{path}: is torchvision's RetinaNet with GroupNorm in the heads (retinanet_resnet50_fpn_v2), which this "
            "library does not have; use the weights of retinanet_resnet50_fpn instead"
        )
    unknown = [name for name in state if _new_name(name) is None]
    if unknown:
        raise UserError(f"{path}: is not a RetinaNet of torchvision that can be converted: it has {unknown[0]}")
    new = {_new_name(name): value for name, value in state.items()}
    for key in BOX_HEAD:  # ours regresses in units of DELTA_STD
        std = new[key].new_tensor(DELTA_STD).repeat(len(new[key]) // 4)  # [num_anchors * 4]
        new[key] = new[key] / std.reshape(-1, *[1] * (new[key].dim() - 1))

    anchors = torchvision_anchors()
    num_classes = len(new[CLASS_HEAD[1]]) // anchors.num_anchors
    info = {
        "found": f"torchvision's RetinaNet with {num_classes} outputs",
        "anchors": anchors.settings(),
        "min_side": 800,
        "max_side": 1333,
    }
    coco_names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    if num_classes == len(coco_names):
        used = [label for label, name in enumerate(coco_names) if name not in NO_CLASS]
        for key in CLASS_HEAD:
            new[key] = new[key].unflatten(0, (anchors.num_anchors, num_classes))[:, used].flatten(0, 1)
        info["class_names"] = [coco_names[label] for label in used]
        info["found"] += f", of which the {len(used)} of COCO's classes are kept"
        if "bn1.num_batches_tracked" not in new:
            _change_eps(new)
    return new, info


def _change_eps(state: dict[str, Tensor]) -> None:
    """Change the scales of all BatchNorms, which torchvision's first COCO weights use with eps 0, to fit BN_EPS."""
    for key in [key for key in state if key.endswith("running_var")]:
        variance = state[key].double()
        scale = key.replace("running_var", "weight")
        state[scale] = (state[scale] * ((variance + BN_EPS) / variance).sqrt()).to(state[scale].dtype)
