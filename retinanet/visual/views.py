"""What the detector is given and what it makes of it, drawn: truth, detections, anchors, assignment, batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from retinanet.anchors import Anchors
from retinanet.boxes import box_iou
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import collater
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import UnNormalizer
from retinanet.errors import UserError
from retinanet.evaluation.errors import greedy_match
from retinanet.matcher import IGNORE, match_anchors
from retinanet.postprocess import Detections
from retinanet.process import log, seeded
from retinanet.visual.drawing import (
    class_colour,
    contact_sheet,
    draw_boxes,
    legible_zoom,
    line_width,
    save_image,
    side_by_side,
)

RED = (255, 60, 60)  # of boxes that no anchor reaches; no class has it
BLUE = (80, 130, 255)  # of ignored anchors: half as bright as white, so it shows on dark and light ground
RATIO_COLOURS = ((255, 153, 119), (0, 255, 0), (0, 255, 255))  # of anchors of the first, second and third ratio
THUMBNAIL_SIDE = 640  # pixels of the long side of a picture on a sheet
BATCH_LIMIT = 16  # images of a batch that are drawn
FRAME = 8  # pixels around the image in pictures of anchors
CROWDED_SIDE = 600  # pixels of the short side that many anchors need


def to_image(image: np.ndarray | Tensor) -> np.ndarray:
    """An image of a sample or batch, [H, W, 3] or [3, H, W], uint8 or normalised, as [H, W, 3] uint8."""
    image = torch.as_tensor(image)
    if image.shape[0] != 3:
        image = image.permute(2, 0, 1)
    if image.is_floating_point():
        image = (UnNormalizer()(image) * 255).round().clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()


def draw_truth(image: np.ndarray, truth: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """An image with its ground truth, [G, 5] (x1, y1, x2, y2, label)."""
    labels = truth[:, 4].astype(int)
    return draw_boxes(image, truth[:, :4], labels, [class_names[label] for label in labels])


def judge(detections: Detections, truth: np.ndarray, iou_threshold: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which boxes are found.

    Args:
        detections: of one image, best first.
        truth: [G, 5] (x1, y1, x2, y2, label), in the same pixels.
        iou_threshold: what they must overlap by.

    Returns:
        [N] bool and [G] bool.
    """
    truth = torch.as_tensor(truth)
    iou = box_iou(detections.boxes, truth[:, :4])  # [N, G]
    iou[detections.labels[:, None] != truth[:, 4]] = 0
    taken = greedy_match(iou.numpy(), iou_threshold)
    return taken >= 0, np.isin(np.arange(len(truth)), taken)


def draw_detections(
    image: np.ndarray,
    truth: np.ndarray,
    detections: Detections,
    class_names: Sequence[str],
    iou_threshold: float = 0.5,
) -> np.ndarray:
    """The ground truth and the detections of one image, side by side: right solid, false dashed, missed dotted.

    Args:
        image: [H, W, 3] uint8.
        truth: [G, 5] (x1, y1, x2, y2, label), pixels of the image.
        detections: boxes in pixels of the image.
        class_names: name of each label.
        iou_threshold: from which a detection is right.
    """
    right, found = judge(detections, truth, iou_threshold)
    missed = ~found
    truth_labels = truth[:, 4].astype(int)
    truth_captions = [class_names[label] for label in truth_labels]
    truth_styles = ["solid" if hit else "dotted" for hit in found]
    scores, labels, boxes = (tensor.numpy() for tensor in detections)
    captions = [f"{class_names[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    captions += [f"missed {class_names[label]}" for label in truth_labels[missed]]
    zoom = max(legible_zoom(image.shape[:2], texts) for texts in (truth_captions, captions))
    pictures = [
        draw_boxes(image, truth[:, :4], truth_labels, truth_captions, truth_styles, zoom=zoom),
        draw_boxes(
            image,
            np.concatenate([boxes, truth[missed, :4]]),
            [*labels, *truth_labels[missed]],
            captions,
            ["solid" if hit else "dashed" for hit in right] + ["dotted"] * missed.sum(),
            zoom=zoom,
        ),
    ]
    counts = f"{right.sum()} right (solid), {(~right).sum()} false (dashed), {missed.sum()} missed (dotted)"
    return side_by_side(pictures, [f"ground truth: {len(truth)}", f"detections: {counts}"])


def draw_detections_sheet(
    dataset: DetectionDataset,
    found: Mapping[int, Detections],
    indices: Sequence[int],
    score_threshold: float,
    columns: int = 3,
) -> np.ndarray:
    """Truth and detections of several images on one sheet.

    Args:
        dataset: gives pictures and truth.
        found: of each index its Detections, boxes in pixels of the original image.
        indices: which images.
        score_threshold: scores must be above it.
        columns: of the sheet.
    """
    pairs = []
    for index in indices:
        scores, labels, boxes = (values[found[index].scores > score_threshold] for values in found[index])
        image, scale = _shrink(dataset.load_image(index))
        truth = dataset.load_annotations(index) * np.array([scale] * 4 + [1], dtype=np.float32)
        detections = Detections(scores, labels, boxes * scale)
        pairs.append(draw_detections(image, truth, detections, list(dataset.labels.values())))
    return contact_sheet(pairs, columns)


def _shrink(image: np.ndarray) -> tuple[np.ndarray, float]:
    """A picture of at most THUMBNAIL_SIDE pixels, and its size / the size before."""
    return _resize_to(image, min(THUMBNAIL_SIDE, max(image.shape[:2])))


def _resize_to(image: np.ndarray, long_side: int) -> tuple[np.ndarray, float]:
    """A picture whose long side has so many pixels, and its size / the size before."""
    scale = long_side / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)), scale


def save_detections(
    dataset: DetectionDataset,
    found: Mapping[int, Detections],
    path: str | Path,
    score_threshold: float = 0.5,
    limit: int = 12,
) -> None:
    """Write the sheet of `draw_detections_sheet` for the first images that were looked at; for train.py."""
    indices = sorted(found)[:limit]
    if indices:
        save_image(draw_detections_sheet(dataset, found, indices, score_threshold), path)


def save_data_images(dataset: DetectionDataset, sampler: AspectRatioBasedSampler, folder: Path) -> None:
    """Write what a training run is about to see: `labels.png`, and the first batch as `batch.png`.

    Without matplotlib there is no `labels.png`, but a warning.

    Args:
        dataset: of the training, with its transforms.
        sampler: draws the batches; it is left as it was.
        folder: of the run.
    """
    epoch, first_step = sampler.epoch, sampler.first_step
    indices = next(iter(sampler))
    sampler.set_epoch(epoch, first_step)
    samples = []
    for index in indices[:BATCH_LIMIT]:
        with seeded(sampler.seed, epoch, index):  # as the loader's workers do
            samples.append(dataset[index])
    save_image(draw_batch(collater(samples), list(dataset.labels.values())), folder / "batch.png")
    try:
        draw_label_chart(dataset, folder / "labels.png")
    except UserError as error:
        log.warning("warning: no labels.png: %s", error)


def draw_batch(batch: Mapping[str, Any], class_names: Sequence[str], columns: int = 4) -> np.ndarray:
    """A batch as the network gets it, padding and all.

    Args:
        batch: from `collater`.
        class_names: name of each label.
        columns: of the sheet.
    """
    pictures = []
    for image, annotations in zip(batch["img"], batch["annot"].numpy(), strict=True):
        picture, scale = _shrink(to_image(image))
        truth = annotations[annotations[:, 4] >= 0] * np.array([scale] * 4 + [1], dtype=np.float32)
        pictures.append(draw_truth(picture, truth, class_names))
    return contact_sheet(pictures, columns)


def draw_matches(
    image: np.ndarray,
    truth: np.ndarray,
    anchors: Tensor,
    class_names: Sequence[str],
    best_match_iou: float | None = None,
) -> np.ndarray:
    """Which anchors are positive, each in the colour of its box, and beside them those that are ignored.

    A box is captioned with its number of positive anchors; one that has none is red and dotted.

    Args:
        image: [H, W, 3] uint8, as the network is given it.
        truth: [G, 5] (x1, y1, x2, y2, label), pixels of the image.
        anchors: [A, 4] xyxy, pixels of the image.
        class_names: name of each label.
        best_match_iou: as in FocalLoss.
    """
    matches = match_anchors(anchors, torch.as_tensor(truth)[None], best_match_iou)[0]  # [A]
    counts = torch.bincount(matches[matches >= 0], minlength=len(truth)).numpy()  # [G]
    best_iou = box_iou(torch.as_tensor(truth[:, :4]), anchors).amax(dim=1).numpy()  # [G]
    unreached = counts == 0
    labels = truth[:, 4].astype(int)
    captions = [
        f"{class_names[label]}: {count}" + ("" if count else f", best IoU {iou:.2f}")
        for label, count, iou in zip(labels, counts, best_iou, strict=True)
    ]
    colours = [RED if none else class_colour(index) for index, none in enumerate(unreached)]
    styles = ["dotted" if none else "solid" for none in unreached]
    zoom = legible_zoom(image.shape[:2], captions, CROWDED_SIDE)
    positive, ignored = (matches >= 0).nonzero()[:, 0], (matches == IGNORE).nonzero()[:, 0]
    positives = _outline(image, anchors[positive], [colours[row] for row in matches[positive].tolist()], zoom)
    others = _outline(image, anchors[ignored], [BLUE] * len(ignored), zoom)
    pictures = [
        draw_boxes(positives, truth[:, :4] * zoom, labels, captions, styles, colours, zoom=1),
        draw_boxes(others, truth[:, :4] * zoom, labels, None, styles, colours, zoom=1),
    ]
    reached = f"{len(truth) - unreached.sum()} of {len(truth)} boxes"
    background = len(anchors) - len(positive) - len(ignored)
    titles = [
        f"{len(positive)} positive anchors, for {reached} (the number at each box is its own)",
        f"{len(ignored)} ignored anchors (blue); the other {background} are background",
    ]
    return side_by_side(pictures, titles)


def _outline(image: np.ndarray, anchors: Tensor, colours: Sequence[tuple[int, int, int]], zoom: int) -> np.ndarray:
    """Outlines, the more of them the fainter, and their centres, on an image enlarged by `zoom`."""
    opacity = max(20, min(120, 6000 // max(1, len(anchors))))
    picture = Image.fromarray(image)
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    canvas = ImageDraw.Draw(picture, "RGBA")
    radius = line_width(picture.size)
    for (x1, y1, x2, y2), colour in zip((anchors * zoom).tolist(), colours, strict=True):
        canvas.rectangle((x1, y1, x2, y2), outline=(*colour, opacity), width=max(1, radius // 2))
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour, outline=(0, 0, 0))
    return np.asarray(picture)


def draw_anchors(image: np.ndarray, truth: np.ndarray, anchors: Anchors) -> np.ndarray:
    """The anchors of one location of each level, over the image: one colour a ratio, one panel a level, boxes dotted.

    The location is that whose anchors overlap some box most, or the middle one where there are no boxes. Anchors
    may reach beyond the image, which gets a grey margin then.

    Args:
        image: [H, W, 3] uint8, as the network is given it.
        truth: [G, 5] (x1, y1, x2, y2, label), pixels of the image.
        anchors: the anchors.
    """
    height, width = image.shape[:2]
    everything = anchors(torch.empty(1, 3, height, width))[0]
    shapes = anchors.level_shapes(height, width)
    panels, start = [], 0
    for level, stride, (rows, columns) in zip(anchors.pyramid_levels, anchors.strides, shapes, strict=True):
        of_level = everything[start : start + rows * columns * anchors.num_anchors]
        start += len(of_level)
        of_level = of_level.reshape(rows * columns, anchors.num_anchors, 4)
        location = rows // 2 * columns + columns // 2
        if len(truth):
            iou = box_iou(torch.as_tensor(truth[:, :4]), of_level.reshape(-1, 4))  # [G, locations * num_anchors]
            location = int(iou.amax(dim=0).reshape(of_level.shape[:2]).amax(dim=1).argmax())
        cells = of_level[location].numpy()  # [num_anchors, 4]
        low = np.minimum(-FRAME, np.floor(cells[:, :2].min(axis=0))).astype(int)  # (x, y)
        high = np.maximum((width + FRAME, height + FRAME), np.ceil(cells[:, 2:].max(axis=0))).astype(int)
        canvas = np.full((high[1] - low[1], high[0] - low[0], 3), 90, dtype=np.uint8)
        canvas[-low[1] : height - low[1], -low[0] : width - low[0]] = image
        canvas, scale = _resize_to(canvas, THUMBNAIL_SIDE)
        ratio_of = np.arange(len(cells)) // len(anchors.scales) % len(RATIO_COLOURS)
        panel = draw_boxes(
            canvas,
            (np.concatenate([truth[:, :4], cells]) - np.tile(low, 2)) * scale,
            [0] * (len(truth) + len(cells)),
            None,
            ["dotted"] * len(truth) + ["solid"] * len(cells),
            [(255, 255, 255)] * len(truth) + [RATIO_COLOURS[ratio] for ratio in ratio_of],
        )
        areas = (cells[:, 2:] - cells[:, :2]).prod(axis=1)
        sides = " ".join(f"{side:.0f}" for side in np.unique(np.sqrt(areas).round()))
        title = f"P{level}: {rows} x {columns} locations, every {stride} px; sides {sides} px"
        panels.append(side_by_side([panel], [title]))
    return contact_sheet(panels, columns=3)


def draw_label_chart(dataset: DetectionDataset, path: str | Path) -> None:
    """What a data set holds: boxes of each class, their sizes and their places, as a chart.

    Args:
        dataset: gives boxes and image sizes; no picture is read.
        path: of the PNG file.

    Raises:
        UserError: matplotlib is not installed.
    """
    from retinanet.visual.charts import new_figure

    rows = dataset.annotations
    image_index = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    counts = np.bincount(rows[:, 4].astype(int), minlength=dataset.num_classes())
    shown = np.argsort(-counts, kind="stable")[:40]
    figure = new_figure(16, max(4.5, 0.2 * len(shown)))
    classes, sizes, places = figure.subplots(1, 3)
    bars = classes.barh(
        [dataset.label_to_name(label) for label in shown],
        counts[shown],
        color=[np.array(class_colour(int(label))) / 255 for label in shown],
        edgecolor="black",
        linewidth=0.5,
    )
    classes.bar_label(bars, padding=3, fontsize=8)
    classes.invert_yaxis()
    classes.margins(x=0.15)
    rest = f"\nthe {len(shown)} most frequent of {len(counts)} classes" if len(shown) < len(counts) else ""
    empty = int((np.diff(dataset.offsets) == 0).sum())
    classes.set(title=f"{len(rows)} boxes in {len(dataset)} images ({empty} without any){rest}", xlabel="boxes")
    classes.xaxis.get_major_locator().set_params(integer=True)
    if len(rows):
        relative = 100 * rows[:, :4] / np.tile(np.asarray(dataset.image_sizes)[image_index, ::-1], 2)
        _draw_density(sizes, *(relative[:, 2:] - relative[:, :2]).T)
        _draw_density(places, *((relative[:, 2:] + relative[:, :2]) / 2).T)
    sizes.set(title="sizes of boxes", xlabel="width, % of the image", ylabel="height, % of the image")
    places.set(title="centres of boxes", xlabel="x, % of the image", ylabel="y, % of the image")
    places.invert_yaxis()
    figure.savefig(path)


def _draw_density(axes: Any, x: np.ndarray, y: np.ndarray) -> None:
    """How many points fall into each field of a grid from 0 to 100 %."""
    counts, _, _ = np.histogram2d(y.clip(0, 100), x.clip(0, 100), bins=50, range=((0, 100), (0, 100)))
    picture = axes.imshow(np.ma.masked_equal(counts, 0), origin="lower", extent=(0, 100, 0, 100), cmap="viridis")
    bar = axes.figure.colorbar(picture, cax=axes.inset_axes([1.03, 0, 0.05, 1]), label="boxes")
    bar.ax.yaxis.get_major_locator().set_params(integer=True)
