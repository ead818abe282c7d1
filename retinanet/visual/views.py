"""Detections beside the ground truth: right ones solid, false ones dashed, missed boxes dotted."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.postprocess import Detections
from retinanet.visual.drawing import contact_sheet, draw_boxes, fit_to_cell, legible_zoom, save_image, side_by_side
from retinanet.visual.text import readable_names

# The detections of an image, which of them are right [N] bool, and which of its boxes were found [G] bool.
Judged = tuple[Detections, np.ndarray, np.ndarray]


def draw_detections(
    image: np.ndarray,
    annotations: np.ndarray,
    detections: Detections,
    right: np.ndarray,
    found: np.ndarray,
    class_names: Sequence[str],
    zoom: int | None = None,
) -> np.ndarray:
    """Draw the annotations [G, 5] and the detections of one image [H, W, 3], in its pixels, side by side.

    `right` [N] says which detections are right, `found` [G] which boxes were found; `zoom` is a whole factor to enlarge
    by, by default what the captions need.
    """
    names, missed = readable_names(class_names), ~found
    true_labels = annotations[:, 4].astype(int)
    true_captions = [names[label] for label in true_labels]
    scores, labels, boxes = (tensor.numpy() for tensor in detections)
    captions = [f"{names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
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
        (scores, labels, boxes), right, found = judged[index]
        image, scale = fit_to_cell(dataset.load_image(index))
        annotations = dataset.load_annotations(index)
        annotations[:, :4] *= scale
        detections = Detections(scores, labels, boxes * scale)
        pairs.append(draw_detections(image, annotations, detections, right, found, names, zoom=1))
    return contact_sheet(pairs, columns)


def save_detections(dataset: DetectionDataset, judged: Mapping[int, Judged], path: str | Path, limit: int = 12) -> None:
    """Write the sheet of `draw_detections_sheet` for the first images of `judged`; without images, write nothing."""
    if indices := sorted(judged)[:limit]:
        save_image(draw_detections_sheet(dataset, judged, indices), path)
