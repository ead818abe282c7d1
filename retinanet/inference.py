"""Detections in any images: files, arrays, Pillow images, tensors, data sets."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinanet.boxes import xyxy_to_xywh
from retinanet.data.images import PIXEL_LIMIT, open_image, read_image, to_rgb
from retinanet.data.pixels import PixelRanges, RawImage, checked_range, range_of
from retinanet.data.tiles import OVERLAP, Tiling
from retinanet.data.transforms import Resizer
from retinanet.data.video import Video, is_video
from retinanet.detection import detect_images
from retinanet.errors import UserError, shown
from retinanet.model import RetinaNet
from retinanet.process import choose_device, choose_precision
from retinanet.training.checkpoint import LIMITS, load_model
from retinanet.training.settings import as_flags

AnyImage = str | Path | np.ndarray | Image.Image | Tensor


class Prediction(NamedTuple):
    """Detections in one image, best first."""

    scores: Tensor  # [N] float32, from 0 to 1
    labels: Tensor  # [N] int64, 0-based
    boxes: Tensor  # [N, 4] float32 xyxy, pixels of the image
    class_names: list[str]  # [N] the name of each label

    def to_coco(
        self, image_id: int, category_ids: Mapping[int, int] | Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """The detections in COCO's results format, ready for JSON and for `validate.py --detections`.

        Args:
            image_id: the image's id in COCO's annotations; for other formats, its index in the data set.
            category_ids: the id of each label, such as a data set's `coco_labels`; by default the labels themselves,
                which are the ids in all formats but COCO's.
        """
        rows = zip(self.scores.tolist(), self.labels.tolist(), xyxy_to_xywh(self.boxes).tolist(), strict=True)
        return [
            {
                "image_id": operator.index(image_id),
                "category_id": label if category_ids is None else operator.index(category_ids[label]),
                "bbox": [round(value, 3) for value in box],  # pixels
                "score": round(score, 6),
            }
            for score, label, box in rows
        ]

    def to_supervision(self) -> Any:
        """The detections as `supervision.Detections`, with the class names in its `data["class_name"]`.

        Raises:
            UserError: supervision is not installed.
        """
        try:
            from supervision import Detections as Supervised
        except ImportError as error:
            raise UserError("to_supervision needs supervision: pip install supervision") from error
        boxes, scores, labels = (values.numpy() for values in (self.boxes, self.scores, self.labels))
        names = np.array(self.class_names, dtype=str)
        return Supervised(xyxy=boxes, confidence=scores, class_id=labels, data={"class_name": names})


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
    precision: str | torch.dtype = torch.float32,
    nms_threshold: float | str = "auto",
    top_k: int | str | None = "auto",
    tile: int | str | None = "auto",
    tile_overlap: float | str = "auto",
    stream: bool = False,
    pixel_range: tuple[float, float] | None = None,
    pixel_limit: float = PIXEL_LIMIT,
) -> list[Prediction] | Iterator[Prediction]:
    """Find objects in images.

    Files are turned upright according to their EXIF orientation; other images are not turned. An array is [H, W] grey,
    [H, W, 3] RGB or [H, W, 4] RGBA; a tensor is the same with the channels first. uint8 values are used as they are;
    others are scaled by the pixel range, like those of files. Without a range, floating-point arrays must hold numbers
    from 0 to 1.

    Args:
        model: the path of a checkpoint, the result of `checkpoint.load_model` (to read the file only once), or a bare
            model, which may be wrapped in DataParallel.
        images: an image, an iterable of images of any kinds and sizes, or the path of a video.
        score_threshold: scores must be above it; `best` means each class's score of the best F1 in validation. The
            default is `best` if the checkpoint has these scores, otherwise 0.5.
        max_detections: detections per image; None for all; by default as in training, or 100.
        batch_size: number of images of the same size that go through the network together.
        min_side: pixels of the resized short side; by default as in training.
        max_side: limit of the resized long side, pixels; by default as in training.
        class_names: name of each label; by default the checkpoint's.
        device: as `--device`; by default where the model is, or `auto` for a path.
        precision: of the network's arithmetic; also as `--precision`. A model whose weights are not float32 computes
            in their precision.
        nms_threshold: of two boxes of a class with an IoU above this, the one with the higher score is kept; by default
            as in training, or 0.5.
        top_k: candidates per pyramid level, of an image or of a tile; None for all; by default as in training, or 1000.
        tile: images larger than this, pixels, are processed in tiles of this side at full resolution, and the
            detections are merged; None for no tiles; by default as in training, or None.
        tile_overlap: share of the tile's side that neighbours have in common; it should be larger than the objects. By
            default as in training, or 0.25.
        stream: return an iterator, which reads the images as it goes, at most one batch ahead.
        pixel_range: the values that become black and white in images of more than 8 bits; by default those of training
            or, if the training images had 8 bits, those that the file declares or the image holds (see `data.pixels`).
        pixel_limit: largest number of pixels of an image file, in millions.

    Returns:
        One Prediction per image, in order, or one per frame of a video.

    Raises:
        UserError: a file cannot be read, a number is out of range, or the checkpoint has no `best` scores.
        ValueError: an array or a tensor is not an image, or `class_names` does not have one name per class.
    """
    net, info = open_model(model)
    if device or isinstance(model, str | Path):
        net.to(choose_device(device or "auto"), memory_format=torch.channels_last)
    if isinstance(images, str | Path) and is_video(images):
        images = (frame.image for frame in Video(images))
    elif isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
        images = [images]
    names = info.get("class_names") if class_names is None else class_names
    names = [str(label) for label in range(net.num_classes)] if names is None else names
    if isinstance(names, str) or len(names) != net.num_classes:
        raise ValueError(f"class_names must be {net.num_classes} names, one for each class, not {shown(names)}")
    given = dict(zip(LIMITS, (score_threshold, nms_threshold, top_k, max_detections), strict=True))
    given = {name: value for name, value in given.items() if value != "auto"}
    numbers = {"batch_size": batch_size, "min_side": min_side, "max_side": max_side, "precision": precision, **given}
    wanted = {name: value for name, value in numbers.items() if value != "best" and not isinstance(value, torch.dtype)}
    as_flags(wanted, get_type_hints(predict))
    tiles = {"tile": tile, "tile_overlap": tile_overlap}
    tiles = {name: value for name, value in tiles.items() if value != "auto"}
    resizer, tiling = make_resizer(info, min_side, max_side), choose_tiling(info, tiles)
    if isinstance(precision, str):
        precision = choose_precision(precision, next(net.parameters()).device)
    limits = detection_limits({"class_names": names} | info, given, for_use=True)
    pixels = info.get("pixel_range") if pixel_range is None else checked_range(pixel_range), pixel_limit
    arrays = (
        open_image(one, *pixels) if tiling and isinstance(one, str | Path) else as_array(one, *pixels) for one in images
    )
    found = detect_images(net, arrays, resizer, batch_size, precision, tiling, **limits)
    predictions = (Prediction(*one, [names[label] for label in one.labels.tolist()]) for _, one in found)
    return predictions if stream else list(predictions)


def open_model(
    model: str | Path | RetinaNet | tuple[RetinaNet, dict[str, Any]],
) -> tuple[RetinaNet, Mapping[str, Any]]:
    """The model that `predict` is given, and its info from `load_model`; a UserError if it is not a model."""
    if isinstance(model, str | Path):
        model = load_model(model)
    net, info = model if isinstance(model, tuple) and len(model) == 2 else (model, {})
    for wrapper in ("module", "_orig_mod"):  # of DistributedDataParallel and torch.compile
        net = getattr(net, wrapper, net)
    if not (isinstance(net, RetinaNet) and isinstance(info, Mapping)):
        raise UserError(f"model must be a path, a RetinaNet or the result of load_model, not {type(net).__name__}")
    return net, info


def detection_limits(info: Mapping[str, Any], given: Mapping[str, Any], for_use: bool = False) -> dict[str, Any]:
    """The limits of a model's detections, as arguments of `detect`: those in `given`, otherwise those of its `info`.

    The score threshold may be `best`, see `predict`. If none is given, it is the default of `predict` when the
    detections are `for_use`, and that of `info` when they are scored.
    """
    limits, best = {**info.get("limits", LIMITS), **given}, info.get("score_thresholds")
    if for_use and "score_threshold" not in given:
        limits["score_threshold"] = "best" if best else 0.5
    if limits["score_threshold"] == "best":
        if not best:
            raise UserError(
                "score threshold best: the checkpoint holds no scores of the best F1; train.py stores them in best.pt"
            )
        scores = [best["classes"].get(name, best["all"]) for name in info["class_names"]]
        limits |= {"score_threshold": min(scores), "class_thresholds": scores}
    return limits


def make_resizer(info: Mapping[str, Any], min_side: int | None = None, max_side: int | None = None) -> Resizer:
    """The Resizer of a model: to the sides in its `info` from `load_model`, unless others are given.

    It does not enlarge images for a model that was trained on tiles, because such a model has seen no enlarged images.
    """
    sides = min_side or info.get("min_side", 608), max_side or info.get("max_side", 1024)
    return Resizer(*sides, enlarge=not info.get("tile"))


def choose_tiling(info: Mapping[str, Any], given: Mapping[str, Any]) -> Tiling | None:
    """The tiles of a model: `tile` (None or 0 for none) and `tile_overlap` in `given`, otherwise those of its `info`.

    A value out of range, or an overlap without tiles, is a UserError.
    """
    chosen = {"tile": info.get("tile"), "tile_overlap": info.get("tile_overlap", OVERLAP), **given}
    if chosen["tile"] is not None and chosen["tile"] != 0:
        return Tiling(chosen["tile"], chosen["tile_overlap"])
    if "tile_overlap" in given:
        raise UserError("an overlap of tiles (tile_overlap) needs a side of the tiles (tile)")
    return None


def as_array(image: AnyImage, pixel_range: PixelRanges = None, pixel_limit: float = PIXEL_LIMIT) -> np.ndarray:
    """Convert an image of any kind to [H, W, 3] uint8 RGB; see `predict` for the arguments."""
    if isinstance(image, str | Path):
        return read_image(image, pixel_range, pixel_limit)
    if isinstance(image, Image.Image):
        return to_rgb(image, pixel_range)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    kind = f"{type(image).__name__} {getattr(image, 'shape', '')}"
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        raise ValueError(f"an image must be a path, an array, a Pillow image or a tensor [3, H, W], not {kind}")
    if image.shape[2:] not in ((), (1,), (3,), (4,)):
        raise ValueError(f"an image must have 1, 3 or 4 channels, last in an array and first in a tensor, not {kind}")
    pixel_range = range_of(pixel_range, image.dtype)
    is_float = image.dtype.kind == "f"
    if not (is_float or image.dtype in (np.uint8, np.uint16) or (pixel_range and image.dtype.kind in "ui")):
        text = "an image must hold uint8, uint16 or floating-point numbers"
        raise ValueError(f"{text}, not {image.dtype}; other types need a pixel_range")
    if is_float and pixel_range is None:
        pixel_range = 0, 1
        if not (image.min() >= 0 and image.max() <= 1):
            text = "a floating-point image must hold numbers from 0 to 1 or have a pixel_range"
            raise ValueError(f"{text}; normalised images are for net.detect")
    return RawImage(image).decode(pixel_range)
