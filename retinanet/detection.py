"""Run a detector over batches, data sets and streams of images, whole or in tiles; `inference.predict` is for users."""

import itertools
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.ops import batched_nms

from retinanet.boxes import clip_boxes
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import collater, explained, make_loader
from retinanet.data.tiles import Tiling, merge_cut_boxes
from retinanet.data.transforms import Resizer, normalize
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.postprocess import MAX_DETECTIONS, NMS_THRESHOLD, Detections
from retinanet.process import autocast, gather_objects, progress


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
        model: has a method `detect`; its mode is restored.
        loader: from `make_loader`, with samples from Resizer or with tiles; under torchrun, this rank's share of them.
        device: where the model is.
        precision: of the network's arithmetic.
        stop: called before every batch; if it returns True, detection ends with what was found so far.
        **limits: arguments of `RetinaNet.detect`, and `class_thresholds`, a limit [K] for the scores of each class.

    Returns:
        Sample index -> Detections, of all ranks and the same on every rank; on the CPU, boxes in pixels of the
        original image.
    """
    found, tiled = {}, defaultdict(_TileDetections)
    with explained(loader, precision) as seen:
        for batch in progress(loader, "detecting"):
            if stop is not None and stop():
                break
            seen["shape"] = tuple(batch["img"].shape)
            if not batch.keys() >= {"scale", "size"}:
                raise UserError("the samples have no scale and size: end the data set's transform with Resizer")
            detections = detect_batch(model, batch, device, precision, **limits)
            if "tile" in batch:
                tiled[batch["index"][0]].add(batch["tile"], detections)
            else:
                found |= zip(batch["index"], detections, strict=True)
            seen.clear()
    found |= {index: parts.merge(**limits) for index, parts in tiled.items()}
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
    was_training = model.training
    if was_training:  # asked, because switching walks through all modules
        model.eval()
    try:
        with autocast(device, precision if weights == torch.float32 else torch.float32):  # float32 means no autocast
            found = model.detect(images, image_sizes=batch["size"], **limits)
    finally:
        if was_training:
            model.train()
    results = []
    for (scores, labels, boxes), scale in zip(found, batch["scale"], strict=True):
        above = slice(None)
        if class_thresholds is not None:
            above = scores > scores.new_tensor(class_thresholds)[labels]
        results.append(Detections(scores[above].cpu(), labels[above].cpu(), boxes[above].cpu() / scale))
    return results


class _TileDetections:
    """The detections in the tiles of one image, collected until they are merged.

    They are kept in one array, because small tensors of every batch would fragment the memory that large batches need.
    """

    def __init__(self):
        self.tiles: list[list[int]] = []
        self.rows = array("f")  # tile, score, label, x1, y1, x2, y2 of each detection, pixels of its tile

    def add(self, tiles: np.ndarray, found: Sequence[Detections]) -> None:
        """Add the detections in `tiles`, [B, 4] xyxy, pixels of the image."""
        for tile, (scores, labels, boxes) in zip(tiles.tolist(), found, strict=True):
            rows = torch.column_stack([torch.full_like(scores, len(self.tiles)), scores, labels, boxes])
            self.rows.frombytes(rows.numpy().tobytes())
            self.tiles.append(tile)

    def merge(
        self, nms_threshold: float = NMS_THRESHOLD, max_detections: int | None = MAX_DETECTIONS, **_: Any
    ) -> Detections:
        """The Detections of the image: cut boxes are joined or dropped, then NMS within each class removes duplicates.

        The limits are those of `detect`: `top_k` was applied to each tile, `max_detections` is applied to the image.
        """
        rows = torch.tensor(self.rows).reshape(-1, 7)
        tiles, tile_index = torch.tensor(self.tiles).float(), rows[:, 0].long()
        boxes = rows[:, 3:] + tiles[tile_index, :2].repeat(1, 2)
        scores, labels, boxes = merge_cut_boxes(rows[:, 1], rows[:, 2].long(), boxes, tile_index, tiles)
        kept = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
        return Detections(scores[kept], labels[kept], boxes[kept])


def _detect_tiles(
    net: RetinaNet, image: np.ndarray, tiling: Tiling, batch_size: int, precision: torch.dtype, **limits: Any
) -> Detections:
    """Run a detector over the tiles of one image."""
    found, device = _TileDetections(), next(net.parameters()).device
    total = -(-tiling.count(*image.shape[:2]) // batch_size)
    for batch in progress(tiling.batches(image, batch_size), "tiles", total):
        found.add(batch["tile"], detect_batch(net, batch, device, precision, **limits))
    return found.merge(**limits)


def detect_images(
    net: RetinaNet,
    images: Iterable[np.ndarray],
    resizer: Resizer,
    batch_size: int = 4,
    precision: torch.dtype = torch.float32,
    tiling: Tiling | None = None,
    **limits: Any,
) -> Iterator[tuple[np.ndarray, Detections]]:
    """Run a detector over a stream of images; with a `tiling`, images larger than a tile are processed in tiles.

    Only consecutive images of the same size share a batch, so that no image is padded to the size of another, which
    could change its detections. Yields each image, [H, W, 3] uint8, and its Detections, on the CPU, boxes in pixels of
    the image. The model's mode is restored; the limits are those of `detect`.
    """
    device = next(net.parameters()).device
    for (height, width, _), same_size in itertools.groupby(images, key=lambda image: image.shape):
        if tiling and not tiling.fits(height, width):
            for image in same_size:
                yield image, _detect_tiles(net, image, tiling, batch_size, precision, **limits)
        # Copied, because the caller may read the next image into the same memory.
        for group in _batches((np.array(image[:height, :width]) for image in same_size), batch_size):
            batch = collater([resizer({"img": image, "annot": np.zeros((0, 5))}) for image in group])
            found = detect_batch(net, batch, device, precision, **limits)
            for image, (scores, labels, boxes) in zip(group, found, strict=True):
                yield image, Detections(scores, labels, clip_boxes(boxes, height, width))


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Groups of at most `size` images; if an image cannot be read, those before it are yielded before the error."""
    group = []
    try:
        for image in images:
            group.append(image)
            if len(group) == size:
                yield group
                group = []
    except (ValueError, OSError):  # UserError among them
        if group:
            yield group
        raise
    if group:
        yield group


def detect_dataset(model: nn.Module, dataset: DetectionDataset, **limits: float | None) -> dict[int, Detections]:
    """Run a model, which may be wrapped in DataParallel, over a data set with a Resizer, on the model's device."""
    net = getattr(model, "module", model)
    device = next(net.parameters()).device
    return detect(net, make_loader(dataset, batch_size=1, device=device), device, **limits)
