"""Checkpoints: a model and all that rebuilds it, as tensors and plain types that load without running code."""

import contextlib
import logging
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.anchors import Anchors
from retinanet.data.classes import placeholder_names
from retinanet.data.pixels import PixelRanges, checked_range
from retinanet.data.tiles import MAX_OVERLAP, OVERLAP, SIDES, Tiling
from retinanet.errors import UserError, shown
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.postprocess import MAX_DETECTIONS, NMS_THRESHOLD, SCORE_THRESHOLD, TOP_K
from retinanet.process import log
from retinanet.resnet import Bottleneck
from retinanet.training import foreign_weights
from retinanet.training.files import replaced
from retinanet.training.foreign_weights import BOX_HEAD, CLASS_HEAD, STAND_INS, PyramidFromP5, StandIn, make_anchors

MODEL_KEYS = {"model", "class_names", "anchors", "min_side", "max_side"}  # every checkpoint of this library has them
# The default limits of detection, as arguments of `RetinaNet.detect`.
LIMITS = {
    "score_threshold": SCORE_THRESHOLD,
    "nms_threshold": NMS_THRESHOLD,
    "top_k": TOP_K,
    "max_detections": MAX_DETECTIONS,
}
CLASS_OUTPUT, BOX_OUTPUT = CLASS_HEAD[1], BOX_HEAD[1]  # their biases
MAX_SIDE = 100_000  # pixels
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}  # allowed types of weights


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain types; `path` is never a partial file. `replaced` says what is raised."""
    with replaced(path) as file:
        torch.save(dict(content), file)


@contextlib.contextmanager
def checked(path: Path, what: str) -> Iterator[None]:
    """Within the context, an error caused by the content of `path` becomes a UserError that says `what` is wrong."""
    try:
        yield
    except UserError:
        raise
    except (
        OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
        ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
        raise UserError(f"{path}: {what} ({reason})") from error


def _check_file(path: Path) -> None:
    """Raise ValueError if `path` is not a file of torch.save, or a zip file whose parts are damaged."""
    if not path.is_file():
        raise ValueError("not a file")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            start = file.read(100)
        if start.startswith(b"\x80"):  # torch's format before 1.6
            return
        if start.startswith(b"PK"):
            raise ValueError("it is a truncated zip file")
        line = start.split(b"\n")[0]
        if line.isascii() and line.strip(b"\0"):
            raise ValueError(f"it is text that starts with {shown(line.decode())}")
        raise ValueError(f"it starts with {shown(start[:8])}" if start else "it is empty")
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        names = {part.filename.rpartition("/")[2] for part in parts}
        if "data.pkl" not in names or "constants.pkl" in names:
            raise ValueError("an exported model, or another zip file")
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("its parts are larger than the file")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not match its checksum")


def _check_tensors(content: Any, size: int) -> None:
    """Raise ValueError if a tensor is not a dense one whose numbers are all in the file, of `size` bytes."""
    seen, waiting, storages = set(), [content], {}
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, StandIn):
            waiting.append(item.state)
        elif isinstance(item, Tensor):
            if item.layout != torch.strided or item.device.type != "cpu" or item.is_quantized or item.is_nested:
                raise ValueError(f"a tensor of shape {list(item.shape)} is not a dense CPU tensor")
            storage = item.untyped_storage()
            if (item.storage_offset() + item.numel()) * item.element_size() > storage.nbytes():
                raise ValueError(f"a tensor of shape {list(item.shape)} needs more numbers than the file has for it")
            storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > size:
        raise ValueError("its tensors are larger than the file")


def load(path: str | Path) -> Any:
    """Read a file of torch.save to the CPU, without running any code from it.

    It uses torch's restricted reader; the objects of a whole pickled model become StandIns.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors, plain types and known classes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: the checkpoint does not exist")
    try:
        with checked(path, "is not a checkpoint, or is damaged"), torch.serialization.safe_globals(STAND_INS):
            _check_file(path)
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except (LookupError, EOFError, TypeError, AttributeError, AssertionError) as error:  # from the unpickler
                raise ValueError("it is truncated, or not from torch.save") from error
            _check_tensors(content, path.stat().st_size)
            return content
    except pickle.UnpicklingError as error:  # torch's own message advises loading the file without this protection
        name = re.search(r"GLOBAL (?:builtins\.)?([\w.]+)", str(error))  # older torch names the module as well
        raise UserError(
            f"{path}: is damaged, or holds more than tensors and plain types{f' ({name[1]})' if name else ''}, and was "
            "not loaded. If you trust it, load it with the program that saved it, and save model.state_dict() instead"
        ) from error


def model_entries(
    net: RetinaNet,
    class_names: Sequence[str],
    min_side: int,
    max_side: int,
    limits: Mapping[str, float] = LIMITS,
    score_thresholds: Mapping[str, Any] | None = None,
    tiling: Tiling | None = None,
    pixel_range: PixelRanges = None,
) -> dict[str, Any]:
    """The entries of a checkpoint that rebuild a model: weights, depth, classes, anchors, matching rule, sizes, limits.

    `score_thresholds` come from `evaluation.voc.best_scores`, if the model was validated; `tiling` is set if it was
    trained on tiles; `pixel_range` is that of its training images, if they have more than 8 bits.
    """
    state = net.state_dict()
    return {
        "model": state,
        "depth": infer_depth(state),
        "class_names": list(class_names),
        "anchors": net.anchors.settings(),
        "best_match_iou": net.focalLoss.best_match_iou,
        "min_side": min_side,
        "max_side": max_side,
        "limits": dict(limits),
        "score_thresholds": dict(score_thresholds or {}),
        "pixel_range": pixel_range,
        "tile": tiling and tiling.side,
        "tile_overlap": float(tiling.overlap) if tiling else OVERLAP,
    }


def infer_depth(state: Mapping[str, Tensor]) -> int | None:
    """The depth of the ResNet that a state dict belongs to; None if it is not one of ARCHITECTURES."""
    blocks = [len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)]
    bottleneck = "layer1.0.conv3.weight" in state
    for depth, (block, layers) in ARCHITECTURES.items():
        if list(layers) == blocks and (block is Bottleneck) == bottleneck:
            return depth
    return None


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], Anchors]:
    """The weights of any kind of checkpoint under this library's names, the model's info, and its anchors.

    The info has at least `found` (the kind of file), `class_names` (None for a backbone only), `min_side`, `max_side`.
    """
    content = load(path)
    info = {"class_names": None, "anchors": {}, "min_side": 608, "max_side": 1024}
    info |= {"limits": dict(LIMITS), "score_thresholds": {}, "pixel_range": None, "tile": None, "tile_overlap": OVERLAP}
    with checked(path, f"holds a {type(content).__name__}, which is not a complete RetinaNet"):
        if isinstance(content, dict) and content.keys() & (MODEL_KEYS - {"model"}):
            if missing := MODEL_KEYS - content.keys():
                raise UserError(f"{path}: is not a checkpoint of this library: it lacks {', '.join(sorted(missing))}")
            state, _ = foreign_weights.read(path, content.pop("model"))
            info |= {"found": "a checkpoint of this library"} | content
        else:
            state, known = foreign_weights.read(path, content)
            info |= known
        anchors = make_anchors(info["anchors"])
        if info["class_names"] is None and CLASS_OUTPUT in state:
            info["class_names"] = placeholder_names(state[CLASS_OUTPUT].numel() // anchors.num_anchors)
        _check(state, info, anchors)
    return state, info, anchors


def _fits(value: Any, kind: type, low: float, high: float) -> bool:
    """Whether a value is a number of exactly this kind in a range."""
    return type(value) is kind and low <= value <= high


def _check(state: Mapping[str, Tensor], info: Mapping[str, Any], anchors: Anchors) -> None:
    """Raise ValueError if an entry of a checkpoint cannot be a RetinaNet's; torch later checks the other shapes."""
    names = info["class_names"]
    outputs = {BOX_OUTPUT: 4 * anchors.num_anchors}
    if names is not None or CLASS_OUTPUT in state:
        if not (isinstance(names, list) and names and all(isinstance(name, str) and name.strip() for name in names)):
            raise ValueError("class_names")
        outputs[CLASS_OUTPUT] = len(names) * anchors.num_anchors
    limits, scores, rule = info["limits"], info["score_thresholds"], info.get("best_match_iou")
    scores = [scores["all"], *scores["classes"].values()] if scores else []
    ranges = {name: (float, 0, 1) if isinstance(LIMITS[name], float) else (int, 1, 10**6) for name in LIMITS}
    right = {
        **{key: state[key].shape == (length,) for key, length in outputs.items() if key in state},
        **{side: _fits(info[side], int, 1, MAX_SIDE) for side in ("min_side", "max_side")},
        "class_names": len(set(names or ())) == len(names or ()),
        "anchors": anchors.strides == Anchors().strides,
        "best_match_iou": rule is None or _fits(rule, float, 0, 1),
        "metrics": isinstance(info.get("metrics", {}), dict),
        "limits": limits.keys() == ranges.keys() and all(_fits(limits[name], *ranges[name]) for name in limits),
        "pixel_range": info["pixel_range"] is None or checked_range(info["pixel_range"]) == info["pixel_range"],
        "tile": info["tile"] is None or _fits(info["tile"], int, *SIDES),
        "tile_overlap": _fits(info["tile_overlap"], float, 0, MAX_OVERLAP),
        "score_thresholds": all(_fits(score, float, 0, 1) for score in scores),
        "fpn.P6.weight": "fpn.P6.weight" not in state or state["fpn.P6.weight"].dim() == 4,
    }
    if not all(right.values()):
        raise ValueError(", ".join(name for name, fits in right.items() if not fits))
    check_weights(state)


def check_weights(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a weight is not a floating-point tensor, is not finite, or is a variance below 0."""
    for name, weight in state.items():
        if weight.dtype not in FLOATS and not (name.endswith("num_batches_tracked") and weight.dtype == torch.int64):
            raise ValueError(f"{name} is of type {str(weight.dtype).removeprefix('torch.')}")
        if not weight.float().isfinite().all():
            raise ValueError(f"{name} is not finite")
        if name.endswith("running_var") and (weight < 0).any():
            raise ValueError(f"{name} is below 0")


def load_state(net: RetinaNet, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load all weights; if P6 was trained on P5, as in torchvision, the pyramid becomes a PyramidFromP5."""
    p6 = net.fpn.P6
    if "fpn.P6.weight" in state and state["fpn.P6.weight"].shape[1] == p6.out_channels != p6.in_channels:
        net.fpn = PyramidFromP5(*net.out_channels).to(p6.weight.device)
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: {str(error)[:2000]}") from error


def load_model(path: str | Path) -> tuple[RetinaNet, dict[str, Any]]:
    """Rebuild the model of a checkpoint: of this library, of the original or of torchvision.

    A checkpoint of the original may be a state dict, with or without DataParallel's prefix, or a whole pickled model.

    Returns:
        The model in evaluation mode, and the rest of the checkpoint as its info: `class_names` (`placeholder_names`
        if the file has none), `min_side`, `max_side`, ..., and the file's `path`.

    Raises:
        UserError: the file is not a checkpoint of a RetinaNet, or of one that this library cannot represent.
    """
    state, info, anchors = read_weights(path)
    depth = infer_depth(state)
    if depth is None:
        raise UserError(f"{path}: holds no RetinaNet of depth {', '.join(map(str, ARCHITECTURES))}")
    if CLASS_OUTPUT not in state:
        raise UserError(
            f"{path}: holds a ResNet-{depth} backbone, not a RetinaNet; start a training from it with --weights"
        )
    found = info.pop("found")
    net = resnet(depth, len(info["class_names"]), anchors=anchors)
    net.focalLoss.best_match_iou = info.get("best_match_iou")
    load_state(net, state, path)
    level = logging.DEBUG if "depth" in info else logging.INFO  # only other programs' files are worth a line
    log.log(level, "%s: %s, ResNet-%d, %d classes", path, found, depth, net.num_classes)
    return net.eval(), info | {"path": str(path)}
