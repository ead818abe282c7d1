"""Checkpoints: plain tensors and numbers in a file, which no reader needs to trust."""

import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.anchors import Anchors
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.resnet import Bottleneck
from retinanet.utils import UserError


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint: to a temporary name, flushed, then renamed, so that `path` is never half a file.

    Args:
        path: the checkpoint.
        content: tensors and plain types; `model_entries` gives those that describe a model.

    Raises:
        UserError: the disk is full, or the folder cannot be written to; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be saved ({error}); the file before it, if any, is intact") from error


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, onto the CPU, without running any code of it.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain types.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint") from error
    except pickle.UnpicklingError as error:  # its text advises to load the file without this protection: no
        raise UserError(f"{path}: is damaged, or holds more than tensors and plain types, and was not run") from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, struct.error) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: is no checkpoint, or a damaged one ({reason})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def model_entries(net: RetinaNet, class_names: Sequence[str], min_side: int, max_side: int) -> dict[str, Any]:
    """What rebuilds a model: its weights, depth, class names, anchors, and the size that pictures are given."""
    state = net.state_dict()
    return {
        "model": state,
        "depth": infer_depth(state),
        "class_names": list(class_names),
        "anchors": net.anchors.settings(),
        "min_side": min_side,
        "max_side": max_side,
    }


def infer_depth(state: Mapping[str, Tensor]) -> int | None:
    """The depth of the ResNet that a state dict belongs to; None if it is none of ours."""
    blocks = [len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in state
    for depth, (block, layers) in ARCHITECTURES.items():
        if list(layers) == blocks and (block is Bottleneck) == bottleneck:
            return depth
    return None


def load_model(path: str | Path) -> tuple[RetinaNet, dict[str, Any]]:
    """Rebuild the model of a checkpoint.

    Returns:
        The model in evaluation mode, and the rest of the checkpoint: `class_names`, `min_side`, `max_side`, ...

    Raises:
        UserError: it is no checkpoint of a RetinaNet.
    """
    content = load(path)
    missing = {"model", "class_names", "anchors", "min_side", "max_side"} - content.keys()
    if missing:
        raise UserError(f"{path}: is not a checkpoint of this library, it lacks {', '.join(sorted(missing))}")
    state = content.pop("model")
    depth = infer_depth(state)
    if depth is None:
        raise UserError(f"{path}: holds no RetinaNet of depth {', '.join(map(str, ARCHITECTURES))}")
    anchors = Anchors(**content["anchors"])
    num_classes = len(content["class_names"])
    net = resnet(depth, num_classes, anchors=anchors)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from error
    return net.eval(), content
