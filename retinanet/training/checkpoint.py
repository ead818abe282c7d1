"""Checkpoints: plain tensors and numbers in a file, which no reader needs to trust."""

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
from torch import Tensor, nn

from retinanet.anchors import Anchors
from retinanet.data.dataset import placeholder_names
from retinanet.errors import UserError, shown
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.process import log
from retinanet.resnet import Bottleneck
from retinanet.training import foreign_weights

MODEL_KEYS = {"model", "class_names", "anchors", "min_side", "max_side"}  # what rebuilds a model of this library
CLASS_OUTPUT = "classificationModel.output.bias"  # its length is anchors x classes


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
        # torch reports its own trouble with a file that is cut short; the reason stands behind it.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be saved ({reason}); the file before it, if any, is intact") from error
    finally:
        if temporary.exists():
            temporary.unlink()


class _Inert:
    """Stands in for a class of a pickled model: keeps what the file says of it, and can do nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What a whole pickled model of the original, or of this library, consists of. Nothing else is admitted.
_PICKLED_NAMES = {
    "model": "ResNet RetinaNet PyramidFeatures RegressionModel ClassificationModel",
    "resnet": "BasicBlock Bottleneck",
    "utils": "BasicBlock Bottleneck BBoxTransform ClipBoxes",
    "anchors": "Anchors",
    "losses": "FocalLoss",
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
_STAND_INS = [
    type(name, (_Inert,), {"__module__": prefix + module})
    for module, names in _PICKLED_NAMES.items()
    for name in names.split()
    for prefix in (("",) if module.startswith(("torch", "numpy")) else ("", "retinanet."))
]


def _check_sums(path: str | Path) -> None:
    """Compare a file's contents with its checksums, which torch does not: one flipped bit is a wrong weight."""
    if zipfile.is_zipfile(path):  # torch's format since 1.6
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise UserError(f"{path}: is damaged: {damaged} does not match its checksum")


def load(path: str | Path) -> Any:
    """Read a file of torch.save, onto the CPU, without running any code of it.

    torch's own restricted reader does the work; the objects of a whole pickled model come as `_Inert`.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors, plain types and known classes.
    """
    try:
        _check_sums(path)
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such checkpoint") from error
    except pickle.UnpicklingError as error:  # its text advises to load the file without this protection: no
        name = re.search(r"GLOBAL (?:builtins\.)?([\w.]+)", str(error))  # older torch names the module as well
        raise UserError(
            f"{path}: is damaged, or holds more than tensors and plain types{f' ({name[1]})' if name else ''}, and was "
            "not run. If you trust it, load it with the program that saved it, and save model.state_dict() instead"
        ) from error
    except UserError:
        raise
    except (
        OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
        ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: is no checkpoint, or a damaged one ({reason})") from error


def model_entries(net: RetinaNet, class_names: Sequence[str], min_side: int, max_side: int) -> dict[str, Any]:
    """What rebuilds a model: weights, depth, class names, anchors, matching rule, and the size of its pictures."""
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


def _module_state(module: _Inert, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a pickled model."""
    parts = module.state
    transient = parts.get("_non_persistent_buffers_set", ())
    tensors = dict(parts["_parameters"]) | {k: v for k, v in parts["_buffers"].items() if k not in transient}
    state = {prefix + key: value.detach() for key, value in tensors.items() if value is not None}
    for name, child in parts["_modules"].items():
        if child is not None:
            state |= _module_state(child, f"{prefix}{name}.")
    return state


def _module_anchors(module: _Inert) -> dict[str, list]:
    """The anchor settings of a pickled model of this library; none of the original's, which are the default."""
    anchors = module.state["_modules"].get("module", module).state["_modules"]["anchors"].state
    settings = {key: anchors.get(key) for key in Anchors().settings()} | anchors.get("explicit", {})
    return settings if all(isinstance(value, list) for value in settings.values()) else {}


def _read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of any kind of checkpoint under this library's names, and what else is known of the model.

    The latter is at least `found` (the kind of file), `class_names` (None where the file has none), `anchors`,
    `min_side` and `max_side`.
    """
    content = load(path)
    info = {"found": "a state dict", "class_names": None, "anchors": {}, "min_side": 608, "max_side": 1024}
    if isinstance(content, _Inert):
        info["found"] = "a whole pickled model, of which only the weights were read"
        try:
            state, info["anchors"] = _module_state(content), _module_anchors(content)
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: holds a pickled {type(content).__name__}, which is no whole RetinaNet") from error
    elif not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    elif content.keys() & (MODEL_KEYS - {"model"}):
        if missing := MODEL_KEYS - content.keys():
            raise UserError(f"{path}: is not a checkpoint of this library, it lacks {', '.join(sorted(missing))}")
        state = content.pop("model")
        info = {"found": "a checkpoint of this library", **content}
    else:  # of another program: the weights lie bare, or under some name beside other things
        inside = {name: value for name, value in content.items() if _are_weights(value)}
        usual = [inside[name] for name in ("state_dict", "model") if name in inside]
        guesses = usual[:1] or list(inside.values())
        state = guesses[0] if len(guesses) == 1 else content
    if not _are_weights(state):
        names = shown(", ".join(map(str, content)))
        raise UserError(f"{path}: holds other things than the weights of a model: {names}")
    while all("." in key for key in state) and len({key.split(".")[0] for key in state}) == 1:
        state = {key.partition(".")[2]: value for key, value in state.items()}  # DataParallel's `module`, or the like
    if "backbone.body.conv1.weight" in state:
        state, known = foreign_weights.convert(path, state)
        info |= known
    return state, info


def _are_weights(value: Any) -> bool:
    """Whether this is a state dict."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())


def _load_state(net: RetinaNet, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load all weights, and let P6 read the level that it was trained on: C5, or P5 in torchvision's first RetinaNet.

    Raises:
        UserError: the weights are not those of such a model.
    """
    channels = state["fpn.P6.weight"].shape[1] if "fpn.P6.weight" in state else None
    if channels == net.fpn.P6.out_channels != net.fpn.P6.in_channels:
        net.fpn.P6 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1).to(net.fpn.P6.weight.device)
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
    anchors = Anchors(**info["anchors"])
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
        anchors = Anchors(**info["anchors"])
        num_classes = len(state[CLASS_OUTPUT]) // anchors.num_anchors
        message += f", {num_classes} classes"
        if num_classes != net.num_classes:
            state |= {key: value for key, value in own_state.items() if key.startswith("classificationModel.output.")}
            message += f"; this model has {net.num_classes}, so the last layer of its class head starts anew"
        if anchors.settings() != net.anchors.settings():
            if net.anchors.settings() == Anchors().settings():
                net.anchors = anchors.to(net.fpn.P6.weight.device)
                message += "; its anchors are taken over"
            else:
                message += "; its anchors are others, so the box head has to learn anew"
    _load_state(net, state, path)
    return message
