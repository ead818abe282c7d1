"""What training sees, and what the detector finds: annotations, a batch, detections beside the ground truth."""

import copy
import functools
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
from retinanet.postprocess import Detections
from retinanet.process import optional
from retinanet.visual.charts import draw_label_chart
from retinanet.visual.drawing import contact_sheet, draw_boxes, fit_to_cell, legible_zoom, save_image, side_by_side
from retinanet.visual.text import readable_names

BATCH_LIMIT = 16  # images of a batch that are drawn

# The detections of an image, which of them are right [N] bool, and which of its boxes were found [G] bool.
Judged = tuple[Detections, np.ndarray, np.ndarray]


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
    """Draw an image with its annotations [G, 5], enlarged by `zoom` or as the captions require."""
    labels, names = annotations[:, 4].astype(int), readable_names(class_names)
    captions = [names[label] for label in labels]
    return draw_boxes(image, annotations[:, :4], labels, captions, zoom=zoom, class_names=class_names)


def draw_batch(batch: Mapping[str, Any], class_names: Sequence[str]) -> np.ndarray:
    """Draw a batch from `collater` as the network receives it, including its padding."""
    pictures = []
    for image, annotations in zip(batch["img"], batch["annot"].numpy(), strict=True):
        picture, scale = fit_to_cell(to_image(image))
        annotations = annotations[annotations[:, 4] >= 0]
        annotations[:, :4] *= scale
        pictures.append(draw_annotations(picture, annotations, class_names, zoom=1))
    return contact_sheet(pictures, columns=4)


def save_data_images(dataset: DetectionDataset, sampler: AspectRatioBasedSampler, folder: Path) -> None:
    """Write what a training run is about to see: `labels.png`, and the first batch as `batch.png`.

    An image that cannot be drawn or written, as without matplotlib, is a warning.
    """
    numbers = next(copy.copy(sampler).numbered_batches())[:BATCH_LIMIT]
    with optional("batch.png"):
        batch = collater([read_sample(dataset, sampler.seed, sampler.epoch, number) for number in numbers])
        save_image(draw_batch(batch, list(dataset.labels.values())), folder / "batch.png")
    with optional("labels.png"):
        draw_label_chart(dataset, folder / "labels.png")


def draw_detections(
    image: np.ndarray,
    annotations: np.ndarray,
    judged: Judged,
    class_names: Sequence[str],
    zoom: int | None = None,
) -> np.ndarray:
    """Draw an image [H, W, 3] twice, side by side: with its annotations [G, 5], and with its detections.

    Right detections are solid, false ones dashed, missed boxes dotted. `zoom` is a whole factor to enlarge by, by
    default what the captions require.
    """
    (scores, labels, boxes), right, found = judged
    names, missed, labels = readable_names(class_names), ~found, labels.numpy()
    true_labels = annotations[:, 4].astype(int)
    true_captions = [names[label] for label in true_labels]
    captions = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores.numpy(), strict=True)]
    captions += [f"missed {names[label]}" for label in true_labels[missed]]
    zoom = legible_zoom(image.shape[:2], [*true_captions, *captions]) if zoom is None else zoom
    draw = functools.partial(draw_boxes, image, zoom=zoom, class_names=class_names)
    true_styles = ["solid" if hit else "dotted" for hit in found]
    styles = ["solid" if hit else "dashed" for hit in right] + ["dotted"] * missed.sum()
    drawn_boxes, drawn_labels = np.concatenate([boxes, annotations[missed, :4]]), [*labels, *true_labels[missed]]
    panels = [
        draw(annotations[:, :4], true_labels, true_captions, true_styles),
        draw(drawn_boxes, drawn_labels, captions, styles),
    ]
    counts = f"{right.sum()} right (solid), {(~right).sum()} false (dashed), {missed.sum()} missed (dotted)"
    return side_by_side(panels, [f"ground truth: {len(annotations)}", f"detections: {counts}"])


def draw_detections_sheet(
    dataset: DetectionDataset, judged: Mapping[int, Judged], indices: Sequence[int], columns: int = 3
) -> np.ndarray:
    """Draw the ground truth and the detections of several images, boxes in pixels of the originals, on one sheet."""
    names, pairs = list(dataset.labels.values()), []
    for index in indices:
        found, *verdicts = judged[index]
        image, scale = fit_to_cell(dataset.load_image(index))
        annotations = dataset.load_annotations(index)
        annotations[:, :4] *= scale
        found = found._replace(boxes=found.boxes * scale)
        pairs.append(draw_detections(image, annotations, (found, *verdicts), names, zoom=1))
    return contact_sheet(pairs, columns)


def save_detections(dataset: DetectionDataset, judged: Mapping[int, Judged], path: str | Path, limit: int = 12) -> None:
    """Write the sheet of `draw_detections_sheet` for the first images of `judged`; without images, write nothing."""
    if indices := sorted(judged)[:limit]:
        save_image(draw_detections_sheet(dataset, judged, indices), path)
