"""Detections on any pictures: files, arrays, Pillow images, tensors, data sets."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from retinanet.boxes import clip_boxes
from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import read_image
from retinanet.data.loader import collater, explained, make_loader
from retinanet.data.transforms import Resizer, normalize
from retinanet.model import RetinaNet
from retinanet.postprocess import MAX_DETECTIONS, Detections
from retinanet.process import choose_device, choose_precision, gather_objects, progress
from retinanet.training.checkpoint import load_model

Picture = str | Path | np.ndarray | Image.Image | Tensor


class Prediction(NamedTuple):
    """What was found in one picture, best first.

    Attributes:
        scores: [N] float32, from 0 to 1.
        labels: [N] int64, 0-based.
        boxes: [N, 4] float32 xyxy, pixels of the picture.
        class_names: [N] the name of each label.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    class_names: list[str]


def predict(
    model: str | Path | RetinaNet | tuple[RetinaNet, dict[str, Any]],
    images: Picture | Iterable[Picture],
    score_threshold: float = 0.5,
    max_detections: int | None = MAX_DETECTIONS,
    batch_size: int = 4,
    min_side: int | None = None,
    max_side: int | None = None,
    class_names: Sequence[str] | None = None,
    device: str | None = None,
    precision: torch.dtype | str = torch.float32,
) -> list[Prediction]:
    """Find objects in pictures.

    A file is turned upright as its EXIF orientation says. Everything else is taken as it stands: an array is
    [H, W] grey, [H, W, 3] RGB or [H, W, 4] RGBA, a tensor the same with the channels first; both hold uint8,
    uint16, or floating-point numbers from 0 to 1.

    Args:
        model: the path of a checkpoint, or what `checkpoint.load_model` gave (which saves reading it again), or
            a bare model, also within DataParallel.
        images: a picture, or several of any kinds and sizes.
        score_threshold: scores must be above it.
        max_detections: detections a picture; None for all.
        batch_size: pictures of the same size that go through the network together.
        min_side: pixels of the resized short side; by default as in training.
        max_side: limit of the resized long side, pixels; by default as in training.
        class_names: name of each label; by default the checkpoint's.
        device: as `--device`; by default where the model is, or `auto` for a path.
        precision: of the network's arithmetic; also as `--precision`.

    Returns:
        One Prediction a picture, in order.

    Raises:
        UserError: a file cannot be read.
        ValueError: an array or a tensor is no picture, or `class_names` are not as many as the classes.
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
    if len(names) != net.num_classes:
        raise ValueError(f"class_names has {len(names)} names, but the model {net.num_classes} classes")
    resizer = Resizer(min_side or info.get("min_side", 608), max_side or info.get("max_side", 1024))
    if isinstance(precision, str):
        precision = choose_precision(precision, next(net.parameters()).device)
    limits = {"score_threshold": score_threshold, "max_detections": max_detections}
    found = detect_images(net, map(as_array, images), resizer, batch_size, precision, **limits)
    return [Prediction(*detections, [names[label] for label in detections.labels.tolist()]) for _, detections in found]


def as_array(image: Picture) -> np.ndarray:
    """A picture of any kind, see `predict`, as [H, W, 3] uint8 RGB."""
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        if not image.mode.startswith("I"):
            return np.array(image.convert("RGB"))
        image = np.asarray(image).clip(0, 2**16 - 1).astype(np.uint16)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
        image = image.numpy().transpose(1, 2, 0) if image.ndim == 3 else image.numpy()
    kind = f"{type(image).__name__} {getattr(image, 'shape', '')}"
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        raise ValueError(f"a picture is a path, an array, a Pillow image or a tensor [3, H, W], not {kind}")
    image = image[:, :, None] if image.ndim == 2 else image
    if image.shape[2] not in (1, 3, 4):
        raise ValueError(f"a picture has 1, 3 or 4 channels: last in an array, first in a tensor; not {kind}")
    if image.dtype == np.uint16:  # keep the upper 8 bits
        image = (image >> 8).astype(np.uint8)
    elif np.issubdtype(image.dtype, np.floating):
        if not (image.min() >= 0 and image.max() <= 1):
            raise ValueError("a floating-point picture holds numbers from 0 to 1; normalised ones are for net.detect")
        image = (255 * image).round().astype(np.uint8)
    elif image.dtype != np.uint8:
        raise ValueError(f"a picture holds uint8, uint16 or floating-point numbers, not {image.dtype}")
    return np.broadcast_to(image[:, :, :3], (*image.shape[:2], 3)).copy()


def detect(
    model: nn.Module,
    loader: Iterable[dict[str, Any]],
    device: torch.device,
    precision: torch.dtype = torch.float32,
    stop: Callable[[], bool] | None = None,
    **limits: float | None,
) -> dict[int, Detections]:
    """Run a detector over a data set.

    Args:
        model: has `detect`; it is in the mode that it was in afterwards.
        loader: batches from `collater`, of samples from Resizer; under torchrun, this rank's share of them.
        device: where the model is.
        precision: of the network's arithmetic.
        stop: asked before every batch whether to leave off, with what was found so far.
        **limits: arguments of `RetinaNet.detect`: `score_threshold`, `nms_threshold`, `top_k`, `max_detections`.

    Returns:
        For the index of each sample of all ranks its Detections, on the CPU, boxes in pixels of the original image;
        the same on every rank.
    """
    was_training = model.training
    model.eval()
    found = {}
    try:
        with explained(loader, precision) as seen:
            for batch in progress(loader, "detecting"):
                if stop is not None and stop():
                    break
                seen["shape"] = tuple(batch["img"].shape)
                found |= zip(batch["index"], detect_batch(model, batch, device, precision, **limits), strict=True)
                seen.clear()
    finally:
        model.train(was_training)
    return {index: one for share in gather_objects(found) for index, one in share.items()}


def detect_batch(
    model: nn.Module, batch: dict[str, Any], device: torch.device, precision: torch.dtype, **limits: float | None
) -> list[Detections]:
    """The Detections of each image of a batch from `collater`, as `detect` gives them; its arguments are `detect`'s."""
    images = normalize(batch["img"].to(device, non_blocking=True))
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        found = model.detect(images, image_sizes=batch["size"], **limits)
    return [
        Detections(scores.cpu(), labels.cpu(), boxes.cpu() / scale)
        for (scores, labels, boxes), scale in zip(found, batch["scale"], strict=True)
    ]


@torch.no_grad()
def detect_images(
    net: RetinaNet,
    pictures: Iterable[np.ndarray],
    resizer: Resizer,
    batch_size: int = 4,
    precision: torch.dtype = torch.float32,
    **limits: float | None,
) -> Iterator[tuple[np.ndarray, Detections]]:
    """Run a detector over pictures, as they come.

    Only neighbours of the same size share a batch, so no picture is padded, and none sees the others.

    Args:
        net: the model; it is in the mode that it was in afterwards.
        pictures: [H, W, 3] uint8 each.
        resizer: gives pictures the size that the network is used to.
        batch_size: pictures a batch.
        precision: of the network's arithmetic.
        **limits: arguments of `RetinaNet.detect`.

    Yields:
        Each picture and its Detections, on the CPU, boxes in pixels of the picture.
    """
    device = next(net.parameters()).device
    waiting: list[np.ndarray] = []

    def run() -> Iterator[tuple[np.ndarray, Detections]]:
        samples = [{"img": picture, "annot": np.zeros((0, 5))} for picture in waiting]
        batch = collater([resizer(sample) for sample in samples])
        was_training = net.training
        net.eval()
        try:
            found = detect_batch(net, batch, device, precision, **limits)
        finally:
            net.train(was_training)
        for picture, (scores, labels, boxes) in zip(waiting, found, strict=True):
            yield picture, Detections(scores, labels, clip_boxes(boxes, *picture.shape[:2]))

    for picture in pictures:
        if waiting and (len(waiting) == batch_size or picture.shape != waiting[0].shape):
            yield from run()
            waiting = []
        waiting.append(picture)
    if waiting:
        yield from run()


def detect_dataset(model: nn.Module, dataset: DetectionDataset, **limits: float | None) -> dict[int, Detections]:
    """Run a model over a data set, where it is and as it is.

    Args:
        model: a RetinaNet, or a DataParallel around it.
        dataset: with a Resizer among its transforms.
        **limits: arguments of `RetinaNet.detect`.
    """
    net = getattr(model, "module", model)
    device = next(net.parameters()).device
    return detect(net, make_loader(dataset, batch_size=1, device=device), device, **limits)
