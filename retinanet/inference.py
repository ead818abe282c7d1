"""Detections in any images: files, arrays, Pillow images, tensors, data sets."""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from retinanet.boxes import clip_boxes
from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import read_image, to_rgb
from retinanet.data.loader import collater, explained, make_loader
from retinanet.data.transforms import Resizer, normalize
from retinanet.errors import UserError, shown
from retinanet.model import RetinaNet
from retinanet.postprocess import Detections
from retinanet.process import autocast, choose_device, choose_precision, gather_objects, progress
from retinanet.training.checkpoint import LIMITS, load_model

AnyImage = str | Path | np.ndarray | Image.Image | Tensor


class Prediction(NamedTuple):
    """Detections in one image, best first."""

    scores: Tensor  # [N] float32, from 0 to 1
    labels: Tensor  # [N] int64, 0-based
    boxes: Tensor  # [N, 4] float32 xyxy, pixels of the image
    class_names: list[str]  # [N] the name of each label


def predict(
    model: str | Path | RetinaNet | tuple[RetinaNet, dict[str, Any]],
    images: AnyImage | Iterable[AnyImage],
    score_threshold: float | str = "auto",
    max_detections: int | str | None = "auto",
    batch_size: int = 4,
    min_side: int | None = None,
    max_side: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | None = None,
    precision: torch.dtype | str = torch.float32,
    nms_threshold: float | str = "auto",
    top_k: int | str | None = "auto",
) -> list[Prediction]:
    """Find objects in images.

    A file is turned upright as its EXIF orientation says. Everything else is taken as it is: an array is
    [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA, a tensor the same with the channels first; both hold uint8,
    uint16, or floating-point numbers from 0 to 1.

    Args:
        model: the path of a checkpoint, or the result of `checkpoint.load_model` (to read it only once), or
            a bare model, also within DataParallel.
        images: an image, or several of any kinds and sizes.
        score_threshold: scores must be above it; `best`: above those of the best F1 in validation, of each class its
            own; by default that, where the checkpoint has them, or 0.5.
        max_detections: detections an image; None for all; by default as in training, or 100.
        batch_size: images of the same size that go through the network together.
        min_side: pixels of the resized short side; by default as in training.
        max_side: limit of the resized long side, pixels; by default as in training.
        class_names: name of each label; by default the checkpoint's.
        device: as `--device`; by default where the model is, or `auto` for a path.
        precision: of the network's arithmetic; also as `--precision`. A model whose weights are not float32 computes
            in their precision.
        nms_threshold: of two boxes of a class that overlap by more than this IoU, the better one is kept; by default as
            in training, or 0.5.
        top_k: candidates of each pyramid level; None for all; by default as in training, or 1000.

    Returns:
        One Prediction an image, in order.

    Raises:
        UserError: a file cannot be read, or the checkpoint has no `best` scores.
        ValueError: an array or a tensor is not an image, or `class_names` are not as many as the classes.
    """
    if isinstance(model, str | Path):
        model, device = load_model(model), device or "auto"
    net, info = model if isinstance(model, tuple) else (getattr(model, "module", model), {})
    if device is not None:
        net.to(choose_device(device), memory_format=torch.channels_last)
    if isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
        images = [images]
    names = info.get("class_names") if class_names is None else class_names
    names = [str(label) for label in range(net.num_classes)] if names is None else names
    if isinstance(names, str) or len(names) != net.num_classes:
        raise ValueError(f"class_names must be {net.num_classes} names, as many as the model's classes: {shown(names)}")
    resizer = Resizer(min_side or info.get("min_side", 608), max_side or info.get("max_side", 1024))
    if isinstance(precision, str):
        precision = choose_precision(precision, next(net.parameters()).device)
    given = dict(zip(LIMITS, (score_threshold, nms_threshold, top_k, max_detections), strict=True))
    given = {name: value for name, value in given.items() if value != "auto"}
    limits = detection_limits({"class_names": names} | info, given, for_use=True)
    found = detect_images(net, map(as_array, images), resizer, batch_size, precision, **limits)
    return [Prediction(*detections, [names[label] for label in detections.labels.tolist()]) for _, detections in found]


def detection_limits(info: Mapping[str, Any], given: Mapping[str, Any], for_use: bool = False) -> dict[str, Any]:
    """The limits of a model's detections, as arguments of `detect`.

    Args:
        info: from `load_model`; its limits are the defaults.
        given: those that are given; the score threshold may be `best`, see `predict`.
        for_use: where no score threshold is given, it is that of `predict`; otherwise that of validation.

    Raises:
        UserError: the score threshold is `best`, and the checkpoint has none.
    """
    limits, best = {**info.get("limits", LIMITS), **given}, info.get("score_thresholds")
    if for_use and "score_threshold" not in given:
        limits["score_threshold"] = "best" if best else 0.5
    if limits["score_threshold"] == "best":
        if not best:
            raise UserError(
                "score threshold best: the checkpoint holds no scores of the best F1, which train.py stores in best.pt"
            )
        scores = [best["classes"].get(name, best["all"]) for name in info["class_names"]]
        limits |= {"score_threshold": min(scores), "class_thresholds": scores}
    return limits


def as_array(image: AnyImage) -> np.ndarray:
    """Convert an image of any kind, see `predict`, to [H, W, 3] uint8 RGB."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    kind = f"{type(image).__name__} {getattr(image, 'shape', '')}"
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        raise ValueError(f"an image is a path, an array, a Pillow image or a tensor [3, H, W], not {kind}")
    image = image[:, :, None] if image.ndim == 2 else image
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"an image has 1, 3 or 4 channels: last in an array, first in a tensor; not {kind}")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    elif np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError("a floating-point image holds numbers from 0 to 1; normalised ones are for net.detect")
        image = (255 * image).round().astype(np.uint8)
    elif image.dtype != np.uint8:
        raise ValueError(f"an image holds uint8, uint16 or floating-point numbers, not {image.dtype}")
    return np.broadcast_to(image[:, :, :3], (*image.shape[:2], 3)).copy()


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterwards in its own mode again."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def detect(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    stop: Callable[[], bool] | None = None,
    **limits: Any,
) -> dict[int, Detections]:
    """Run a detector over a data set.

    Args:
        model: has `detect`; it keeps its mode.
        loader: batches from `collater`, of samples from Resizer; under torchrun, this rank's share of them.
        device: where the model is.
        precision: of the network's arithmetic.
        stop: called before every batch; where it returns True, detection ends with what was found so far.
        **limits: arguments of `RetinaNet.detect`, and `class_thresholds` [K], which scores of each class must be above.

    Returns:
        The Detections of each sample index of all ranks, on the CPU, boxes in pixels of the original image;
        the same on every rank.
    """
    found = {}
    with _evaluation_mode(model), explained(loader, precision) as seen:
        for batch in progress(loader, "detecting"):
            if stop is not None and stop():
                break
            seen["shape"] = tuple(batch["img"].shape)
            found |= zip(batch["index"], detect_batch(model, batch, device, precision, **limits), strict=True)
            seen.clear()
    return {index: one for share in gather_objects(found) for index, one in share.items()}


def detect_batch(
    model: nn.Module,
    batch: dict[str, Any],
    device: torch.device,
    precision: torch.dtype,
    class_thresholds: Sequence[float] | None = None,
    **limits: Any,
) -> list[Detections]:
    """Run a detector over one batch from `collater`; arguments and detections are those of `detect`."""
    weights = next((weight.dtype for weight in model.parameters()), torch.float32)
    images = normalize(batch["img"].to(device, non_blocking=device.type == "cuda")).to(weights)
    with autocast(device, precision if weights == torch.float32 else torch.float32):  # float32 means no autocast
        found = model.detect(images, image_sizes=batch["size"], **limits)
    if class_thresholds is not None:
        above = [one.scores > one.scores.new_tensor(class_thresholds)[one.labels] for one in found]
        found = [Detections(*(values[kept] for values in one)) for one, kept in zip(found, above, strict=True)]
    return [
        Detections(scores.cpu(), labels.cpu(), boxes.cpu() / scale)
        for (scores, labels, boxes), scale in zip(found, batch["scale"], strict=True)
    ]


def detect_images(
    net: RetinaNet,
    images: Iterable[np.ndarray],
    resizer: Resizer,
    batch_size: int = 4,
    precision: torch.dtype = torch.float32,
    **limits: Any,
) -> Iterator[tuple[np.ndarray, Detections]]:
    """Run a detector over a stream of images.

    Only consecutive images of the same size share a batch: none is padded, so the others do not affect its detections.
    Yields each image, [H, W, 3] uint8, and its Detections, on the CPU, boxes in pixels of the image; the model keeps
    its mode, and the limits are those of `detect`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    device = next(net.parameters()).device
    for (height, width, _), same_size in itertools.groupby(images, key=np.shape):
        while group := list(itertools.islice(same_size, batch_size)):
            batch = collater([resizer({"img": image, "annot": np.zeros((0, 5))}) for image in group])
            with _evaluation_mode(net):
                found = detect_batch(net, batch, device, precision, **limits)
            for image, (scores, labels, boxes) in zip(group, found, strict=True):
                yield image, Detections(scores, labels, clip_boxes(boxes, height, width))


def detect_dataset(model: nn.Module, dataset: DetectionDataset, **limits: float | None) -> dict[int, Detections]:
    """Run a model, perhaps within DataParallel, over a data set with a Resizer, on the model's device."""
    net = getattr(model, "module", model)
    device = next(net.parameters()).device
    return detect(net, make_loader(dataset, batch_size=1, device=device), device, **limits)
