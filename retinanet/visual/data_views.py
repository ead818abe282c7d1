"""What training sees: images with their annotations, the first batch, and the label chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import collater, read_sample
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import UnNormalizer
from retinanet.errors import UserError
from retinanet.process import log
from retinanet.visual.charts import draw_label_chart
from retinanet.visual.drawing import contact_sheet, draw_boxes, fit_to_cell, save_image
from retinanet.visual.text import readable_names

BATCH_LIMIT = 16  # images of a batch that are drawn


def to_image(image: np.ndarray | Tensor) -> np.ndarray:
    """An image of a sample or batch, [H, W, 3] or [3, H, W], uint8 or normalised, as [H, W, 3] uint8."""
    image = torch.as_tensor(image)
    if image.shape[0] != 3:
        image = image.permute(2, 0, 1)
    if image.is_floating_point():
        image = (UnNormalizer()(image) * 255).round().clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def draw_annotations(
    image: np.ndarray, annotations: np.ndarray, class_names: Sequence[str], zoom: int | None = None
) -> np.ndarray:
    """Draw an image with its annotations, [G, 5] (x1, y1, x2, y2, label), enlarged by `zoom` or as captions need."""
    labels, names = annotations[:, 4].astype(int), readable_names(class_names)
    captions = [names[label] for label in labels]
    return draw_boxes(image, annotations[:, :4], labels, captions, zoom=zoom, class_names=class_names)


def draw_batch(batch: Mapping[str, Any], class_names: Sequence[str], columns: int = 4) -> np.ndarray:
    """Draw a batch from `collater` as the network receives it, including its padding."""
    pictures = []
    for image, annotations in zip(batch["img"], batch["annot"].numpy(), strict=True):
        picture, scale = fit_to_cell(to_image(image))
        annotations = annotations[annotations[:, 4] >= 0]
        annotations[:, :4] *= scale
        pictures.append(draw_annotations(picture, annotations, class_names, zoom=1))
    return contact_sheet(pictures, columns)


def save_data_images(dataset: DetectionDataset, sampler: AspectRatioBasedSampler, folder: Path) -> None:
    """Write what a training run is about to see: `labels.png`, and the first batch as `batch.png`.

    Without matplotlib, a warning takes the place of `labels.png`. The sampler's position does not change.
    """
    epoch, first_step = sampler.epoch, sampler.first_step
    numbers = next(sampler.numbered_batches())[:BATCH_LIMIT]
    sampler.set_epoch(epoch, first_step)
    batch = collater([read_sample(dataset, sampler.seed, epoch, number) for number in numbers])
    save_image(draw_batch(batch, list(dataset.labels.values())), folder / "batch.png")
    try:
        draw_label_chart(dataset, folder / "labels.png")
    except UserError as error:
        log.warning("warning: no labels.png: %s", error)
