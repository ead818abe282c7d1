"""The weights that `--weights` names: torchvision's, or any checkpoint, with class heads matched by class name."""

import copy
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

from retinanet.anchors import Anchors
from retinanet.data.classes import check_classes, placeholder_names
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError, listed, shortened, suggestion
from retinanet.model import RetinaNet, resnet
from retinanet.process import log
from retinanet.training.checkpoint import CLASS_OUTPUT, infer_depth, load_state, read_weights
from retinanet.training.foreign_weights import BOX_HEAD, CLASS_HEAD

# Names that `--weights` accepts in place of a file, besides `coco` -> versions of torchvision's ImageNet weights.
PRETRAINED = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2", "none": False}
COCO = RetinaNet_ResNet50_FPN_Weights.COCO_V1
COCO_DEPTH, V2_DEPTHS = 50, (50, 101, 152)  # depths for which torchvision has coco and imagenet_v2
MOST_NAMES = 10  # listed in a message


def make_model(depth: int, weights: str, class_names: Sequence[str], anchors: Anchors) -> RetinaNet:
    """The model that a new run starts from; `weights` is one of PRETRAINED, `coco`, or the path of a checkpoint.

    Raises:
        UserError: the weights do not exist, cannot be downloaded, or do not fit.
    """
    names = [*PRETRAINED, "coco"]
    if weights not in names and not Path(weights).exists():
        why = " (torchvision's v2 has GroupNorm in the heads, this library has not)" if weights == "coco_v2" else ""
        near = suggestion(weights, names)
        raise UserError(f"--weights {weights}: neither a file nor one of {', '.join(names)}{why}{near}")
    try:
        net = resnet(depth, len(class_names), PRETRAINED.get(weights, False), anchors)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    if weights not in PRETRAINED:
        log.info("%s", load_weights(net, coco_file() if weights == "coco" else weights, class_names))
    return net


def coco_file() -> Path:
    """Torchvision's RetinaNet trained on COCO, downloaded once to torch.hub's folder; a UserError if it cannot be.

    As in torchvision, the hash in the file's name is checked only after a download.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(COCO.url).name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(COCO.url, str(path), path.stem.rpartition("-")[2], progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"--weights coco: cannot download torchvision's weights ({error}). Put {COCO.url} into {path.parent}"
            ) from error
    return path


def load_weights(net: RetinaNet, path: str | Path, class_names: Sequence[str] | None = None) -> str:
    """Load weights into a model from any checkpoint that `load_model` reads, or from an ImageNet classifier.

    If `class_names`, the model's, and those of the checkpoint are known, the last layer of the class head is copied
    class by class, by name, and other classes keep their initial weights. Otherwise the layer is copied as a whole, or
    keeps its initial weights if the number of classes differs. A model with the default anchors gets those of the
    checkpoint, because its box head was trained for them.

    Returns:
        One line that says what was found and what was done.

    Raises:
        UserError: the checkpoint does not fit the model.
    """
    state, info, anchors = read_weights(path)
    own_state = net.state_dict()
    depth, own_depth = infer_depth(state), infer_depth(own_state)
    if depth != own_depth:
        what = "no known ResNet" if depth is None else f"a ResNet-{depth}"
        raise UserError(f"{path}: holds {what}, but the model is a ResNet-{own_depth} (--depth)")
    message = f"{path}: {info['found']}, ResNet-{depth}"
    if CLASS_OUTPUT not in state:
        backbone = {key: value for key, value in state.items() if not key.startswith("fc.")}
        state = own_state | backbone
        message += ", a backbone only: the pyramid and the heads keep initial weights"
    else:
        theirs = info["class_names"]
        message += f", {len(theirs)} classes"
        own_head = {key: own_state[key] for key in CLASS_HEAD}
        theirs_count, own_count = anchors.num_anchors, net.anchors.num_anchors
        if theirs_count != own_count:
            state |= own_head | {key: own_state[key] for key in BOX_HEAD}
            message += f", {theirs_count} anchors per location, but this model has {own_count} (the flags --anchor_...)"
            message += ", so the last layers of both heads keep initial weights"
        elif class_names is not None and theirs != placeholder_names(len(theirs)):
            found = match_names(theirs, class_names)
            state |= {key: _take_rows(rows, state[key].to(rows), own_count, found) for key, rows in own_head.items()}
            message += _said(theirs, class_names, found)
        elif len(theirs) != net.num_classes:
            state |= own_head
            message += f"; this model has {net.num_classes}, so the last layer of its class head keeps initial weights"
        elif class_names is not None:
            message += " without names, which are taken over in their order"
        if theirs_count == own_count and anchors.settings() != net.anchors.settings():
            if net.anchors.settings() == Anchors().settings():
                net.anchors = anchors
                message += "; its anchors are taken over"
            else:
                message += "; its anchors differ from this model's, so the box head must be retrained"
    load_state(net, state, path)
    return message


def match_names(theirs: Sequence[str], ours: Sequence[str]) -> dict[int, int]:
    """Label of ours -> label of theirs with the same name; case, spaces, `_` and `-` may differ if the match is unique.

    Letters with an accent may be one character or, as on macOS, two.
    """
    exact, loose = {name: label for label, name in enumerate(theirs)}, {}
    for label, name in enumerate(theirs):
        loose.setdefault(_folded(name), []).append(label)
    counts, found = Counter(map(_folded, ours)), {}
    for label, name in enumerate(ours):
        near = loose.get(_folded(name), [])
        if name in exact:
            found[label] = exact[name]
        elif len(near) == counts[_folded(name)] == 1:
            found[label] = near[0]
    return found


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFC", name)).strip().casefold()


def _take_rows(own: Tensor, theirs: Tensor, num_anchors: int, found: Mapping[int, int]) -> Tensor:
    """The class head's last weight or bias [num_anchors * K, ...], with the rows of some labels taken from `theirs`.

    `found` maps these labels to those of `theirs`.
    """
    rows, source = own.clone().unflatten(0, (num_anchors, -1)), theirs.unflatten(0, (num_anchors, -1))
    rows[:, list(found)] = source[:, list(found.values())]
    return rows.flatten(0, 1)


def _said(theirs: Sequence[str], ours: Sequence[str], found: Mapping[int, int]) -> str:
    """The part of the message about classes: which were taken over, and which are new."""
    if list(theirs) == list(ours):
        return ", the same"
    if not found:
        return "; none of them is one of this model's, so the last layer of its class head keeps initial weights"
    pairs = [(ours[label], theirs[other]) for label, other in found.items()]
    names = [name if name == other else f"{name} ({other})" for name, other in pairs]
    taken = listed([shortened(name) for name in names], MOST_NAMES)
    text = f"; class head by name: {len(found)} of {len(ours)} classes are taken over, {taken}"
    new = [shortened(name) for label, name in enumerate(ours) if label not in found]
    return text + (f"; new: {listed(new, MOST_NAMES)}" if new else "")


def match_classes(
    owner: str, net: RetinaNet, info: dict[str, Any], dataset: DetectionDataset
) -> tuple[RetinaNet, dict[str, Any]]:
    """A model and its info, from `load_model`, with labels in the order of a data set's classes.

    If the order differs, both are copies; other classes are a UserError. `owner` is the model's name in messages.
    """
    names, own = list(dataset.labels.values()), info["class_names"]
    if own != names and set(own) == set(names) and own != placeholder_names(len(own)):
        order = dict(enumerate(map(own.index, names)))
        net, info = copy.deepcopy(net), {**info, "class_names": names}
        output = net.classificationModel.output
        for weight in (output.weight.data, output.bias.data):
            weight.copy_(_take_rows(weight, weight, net.anchors.num_anchors, order))
        log.info("%s: its classes are reordered as in %s", owner, dataset.source)
    check_classes(owner, info["class_names"], dataset)
    return net, info
