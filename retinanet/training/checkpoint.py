"""Checkpoints: a model, and all that rebuilds it, as plain tensors and numbers that load without running code."""

import logging
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.data.dataset import placeholder_names
from retinanet.errors import UserError
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.process import log
from retinanet.resnet import Bottleneck
from retinanet.training import foreign_weights
from retinanet.training.foreign_weights import STAND_INS, PyramidFromP5, make_anchors

MODEL_KEYS = {"model", "class_names", "anchors", "min_side", "max_side"}  # what rebuilds a model of this library
CLASS_OUTPUT = "classificationModel.output.bias"  # its length is anchors x classes


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain types: to a temporary name, flushed, then renamed, so that `path` is never half a file.

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
        # torch reports its own trouble with a file that is cut short; the reason is in the error's context.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be saved ({reason}); the file before it, if any, is intact") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _damaged_member(path: str | Path) -> str | None:
    """The first part of a zip file whose checksum is wrong. torch does not check: one flipped bit is a wrong weight."""
    if not zipfile.is_zipfile(path):  # torch's format before 1.6
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def load(path: str | Path) -> Any:
    """Read a file of torch.save, onto the CPU, without running any code of it.

    torch's own restricted reader does the work; the objects of a whole pickled model come as `StandIn`.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors, plain types and known classes.
    """
    try:
        damaged = _damaged_member(path)
        with torch.serialization.safe_globals(STAND_INS):
            content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the checkpoint does not exist") from error
    except pickle.UnpicklingError as error:  # torch's own text advises to load the file without this protection
        name = re.search(r"GLOBAL (?:builtins\.)?([\w.]+)", str(error))  # older torch names the module as well
        raise UserError(
            f"{path}: is damaged, or holds more than tensors and plain types{f' ({name[1]})' if name else ''}, and was "
            "not run. If you trust it, load it with the program that saved it, and save model.state_dict() instead"
        ) from error
    except (
        OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
        ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: is no checkpoint, or a damaged one ({reason})") from error
    if damaged:
        raise UserError(f"{path}: is damaged: {damaged} does not match its checksum")
    return content


def model_entries(net: RetinaNet, class_names: Sequence[str], min_side: int, max_side: int) -> dict[str, Any]:
    """What rebuilds a model: weights, depth, class names, anchors, matching rule, and the size of its images."""
    state = net.state_dict()
    return {
        "model": state,
        "depth": infer_depth(state),
        "class_names": list(class_names),
        "anchors": net.anchors.settings(),
        "best_match_iou": net.focalLoss.best_match_iou,
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


def _read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of any kind of checkpoint under this library's names, and what else is known of the model.

    That is at least `found` (the kind of file), `class_names` (None without any), `anchors`, `min_side`, `max_side`.
    """
    content = load(path)
    info = {"class_names": None, "anchors": {}, "min_side": 608, "max_side": 1024}
    if isinstance(content, dict) and content.keys() & (MODEL_KEYS - {"model"}):
        if missing := MODEL_KEYS - content.keys():
            raise UserError(f"{path}: is not a checkpoint of this library, it lacks {', '.join(sorted(missing))}")
        state, _ = foreign_weights.read(path, content.pop("model"))
        return state, info | {"found": "a checkpoint of this library"} | content
    state, known = foreign_weights.read(path, content)
    return state, info | known


def _load_state(net: RetinaNet, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load all weights; the pyramid becomes torchvision's where P6 was trained on P5."""
    p6 = net.fpn.P6
    if "fpn.P6.weight" in state and state["fpn.P6.weight"].shape[1] == p6.out_channels != p6.in_channels:
        net.fpn = PyramidFromP5(*net.out_channels).to(p6.weight.device)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: {error}") from error


def load_model(path: str | Path) -> tuple[RetinaNet, dict[str, Any]]:
    """Rebuild the model of a checkpoint: of this library, of the original or of torchvision.

    The original's may be a state dict, with or without DataParallel's prefix, or a whole pickled model.

    Returns:
        The model in evaluation mode, and the rest of the checkpoint: `class_names` (those of `placeholder_names`
        where the file has none), `min_side`, `max_side`, ...

    Raises:
        UserError: it is no checkpoint of a RetinaNet, or of one that cannot be represented here.
    """
    state, info = _read_weights(path)
    depth = infer_depth(state)
    if depth is None:
        raise UserError(f"{path}: holds no RetinaNet of depth {', '.join(map(str, ARCHITECTURES))}")
    if CLASS_OUTPUT not in state:
        raise UserError(
            f"{path}: holds the backbone of a ResNet-{depth}, not a RetinaNet; `train.py --weights` takes it"
        )
    anchors = make_anchors(info["anchors"])
    found = info.pop("found")
    if info["class_names"] is None:
        info["class_names"] = placeholder_names(len(state[CLASS_OUTPUT]) // anchors.num_anchors)
    net = resnet(depth, len(info["class_names"]), anchors=anchors)
    net.focalLoss.best_match_iou = info.get("best_match_iou")
    _load_state(net, state, path)
    level = logging.DEBUG if "depth" in info else logging.INFO  # our own checkpoint is no news
    log.log(level, "%s: %s, ResNet-%d, %d classes", path, found, depth, net.num_classes)
    return net.eval(), info


def load_weights(net: RetinaNet, path: str | Path) -> str:
    """Start a model from any checkpoint that `load_model` reads, or from the weights of an ImageNet classifier.

    Where the number of classes differs, the last layer of the class head stays as it was. A model with the default
    anchors takes those of the checkpoint, which its box head was trained for.

    Returns:
        What was found and what was done, in one line.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    state, info = _read_weights(path)
    own_state = net.state_dict()
    depth, own_depth = infer_depth(state), infer_depth(own_state)
    if depth != own_depth:
        what = "no RetinaNet" if depth is None else f"a ResNet-{depth}"
        raise UserError(f"{path}: holds {what}, but the model is a ResNet-{own_depth} (--depth)")
    message = f"{path}: {info['found']}, ResNet-{depth}"
    if CLASS_OUTPUT not in state:
        backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
        state = own_state | backbone
        message += ", a backbone alone: the pyramid and the heads start anew"
    else:
        anchors = make_anchors(info["anchors"])
        num_classes = len(state[CLASS_OUTPUT]) // anchors.num_anchors
        message += f", {num_classes} classes"
        if num_classes != net.num_classes:
            state |= {key: value for key, value in own_state.items() if key.startswith("classificationModel.output.")}
            message += f"; this model has {net.num_classes}, so the last layer of its class head starts anew"
        if anchors.settings() != net.anchors.settings():
            if net.anchors.settings() == make_anchors({}).settings():
                net.anchors = anchors
                message += "; its anchors are taken over"
            else:
                message += "; its anchors are others, so the box head has to learn anew"
    _load_state(net, state, path)
    return message
