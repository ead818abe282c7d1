"""report.html: a page that shows what a detector gets wrong and which score threshold to use; it needs no server.

It consists of the page and of the folder `report` beside it, with JPEG images. Python counts detections
(`score_steps`), and chooses (`choose_images`) and describes the images. The template, style sheet and script are in
`page/`. The script draws curves and boxes and finds the cases of each kind of mistake, so that they follow the slider.
"""

import collections
import datetime
import heapq
import itertools
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image

from retinanet import __version__
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError, escaped, output_file
from retinanet.evaluation import errors, voc
from retinanet.evaluation.report import Evaluation
from retinanet.evaluation.thresholds import Point, Ranking, best_f1, counts_above, threshold

MAX_IMAGES, MAX_BOXES = 300, 60_000  # of the gallery
MAX_BYTES = 40_000_000  # of all JPEG files
# Long side in pixels and JPEG quality, best first: an image gets the first pair whose file is small enough.
QUALITIES = ((1280, 82), (1280, 65), (960, 60), (640, 50), (320, 40))
STEPS, RANKS = 100, 20  # steps of the slider: at equal distances, and at equal numbers of detections
BEST_LIMIT, CURVE_LIMIT = 100, 7  # classes whose best F1 is a step, and whose curves are drawn
MATRIX_LIMIT, BAR_LIMIT = 20, 40  # classes in the confusion matrix, and in the chart of boxes
NEAR_IOU = 0.1  # a box that no detection overlaps by more than this may be an annotation error
SIDES = (0, 16, 32, 64, 96, 128, 256, 512)  # limits of groups of box sizes: square root of the area, pixels
GRID = 24  # cells per side of the map of positions


def write(
    path: Path,
    evaluation: Evaluation,
    source: str,
    is_model: bool,
    training: Sequence[Mapping[str, float]] = (),
    anchors: Mapping[str, Any] | None = None,
) -> None:
    """Write report.html and the images in the folder `report` beside it, replacing earlier ones.

    `source` is the file of the model or, unless `is_model`, of the detections. `training` holds the entries of the
    run's log.jsonl, `anchors` the `summary` of `anchor_report` and the `coverage` of its `as_dict`. Raises UserError
    for files that must not be overwritten, and OSError for those that cannot be written.
    """
    page, folder = output_file(path), path.parent / "report"
    dataset, names = evaluation.dataset, [escaped(name) for name in evaluation.dataset.labels.values()]
    analysis = evaluation.errors or errors.analyse(dataset, evaluation.detections, evaluation.limit)
    rankings = voc.all_rankings(evaluation.voc)
    points = list(map(best_f1, rankings))
    steps = score_steps(rankings, points)
    chosen = choose_images(dataset, analysis, points[-1].score if points[-1] else 0.5)
    images, levels = [], np.array(steps["steps"])
    for index, saved in zip(chosen, _save_images(dataset, chosen, folder), strict=True):
        images.append(_image_entry(dataset, index, analysis.images[index], saved, levels))
    data = {
        "names": names,
        **steps,
        "iou": evaluation.iou_threshold,
        "near": NEAR_IOU,
        "kinds": {"right": "Right"} | {kind: title for kind, (title, _) in errors.KINDS.items()},
        "images": images,
        "training": _training_curves(training),
    }
    about = {
        "Model" if is_model else "Detections": source if is_model else f"{source}; the model is not known",
        "Data": dataset.source,
        "Command": shlex.join(sys.argv),
        "Date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "Versions": f"retinanet {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    classes = zip(itertools.count(), evaluation.coco.classes, points, strict=False)
    text = _template().render(
        source=source,
        about=about,
        metrics=evaluation.coco.metrics,
        best=points[-1],
        classes=sorted(classes, key=lambda entry: (not entry[1].boxes, entry[1].AP)),  # the lowest AP first
        errors=[(kind, *texts, analysis.counts[kind], analysis.lost[kind]) for kind, texts in errors.KINDS.items()],
        ap50=analysis.ap50,
        matrix=confusion_rows(analysis.confusion, names) | {"score": errors.CONFUSION_SCORE},
        statistics=_statistics(evaluation.scored),
        num_images=len(evaluation.detections),
        anchors=anchors,
        data=data,
    )
    page.write_text(text, encoding="utf-8", errors="replace")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retinanet.evaluation", "page"),
        autoescape=True,
        finalize=lambda value: escaped(value) if type(value) is str else value,  # not Markup, a subclass of str
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment.get_template("report.html")


def score_steps(rankings: Sequence[Ranking], points: Sequence[Point | None]) -> dict[str, Any]:
    """The numbers behind the slider: those of each ranking (one per class, then one of all) at each of its steps.

    Steps lie at equal distances; at equal numbers of detections, so that close scores can be told apart; and at the
    best F1 of each ranking, which `points` hold.

    Returns:
        `steps`: rising scores; `counts` and `right`: for each ranking, the numbers of detections and of right ones, as
        differences from one step to the next, because most are 0; `boxes`: the number of boxes of each ranking; `best`:
        the step of its best F1, or None; `start`: the initial step; `curves`: the labels of the most frequent classes.
    """
    scores, boxes = rankings[-1].scores.clip(-1e9, 1e9), [int(ranking.boxes.sum()) for ranking in rankings]
    low, high = scores.min(initial=0), scores.max(initial=1)
    margin = 0 if (low, high) == (0, 1) else (high - low) / STEPS  # results files may hold any numbers
    grid = [float(f"{score:.4g}") for score in np.linspace(low - margin, high, STEPS + 1)]
    curves = np.argsort(-np.array(boxes[:-1]), kind="stable")[:CURVE_LIMIT].tolist()
    for label in [*curves, -1]:  # -1: all classes
        counts = np.linspace(0, len(rankings[label].scores), RANKS, dtype=int)
        grid += [threshold(rankings[label], count) for count in counts.tolist() if count]
    grid += [point.score for point in [*points[:-1][:BEST_LIMIT], points[-1]] if point]
    steps = np.unique([score for score in grid if abs(score) < 2e9])
    places = {score: place for place, score in enumerate(steps.tolist())}
    best = [point and places.get(point.score) for point in points]
    changes = np.diff(np.stack([counts_above(ranking, steps) for ranking in rankings]), prepend=0)  # [K + 1, 2, T]
    return {
        "steps": steps.tolist(),
        "counts": changes[:, 0].tolist(),
        "right": changes[:, 1].tolist(),
        "boxes": boxes,
        "best": best,
        "start": int(np.abs(steps - 0.5).argmin()) if best[-1] is None else best[-1],
        "curves": curves,
    }


def choose_images(dataset: DetectionDataset, analysis: errors.ErrorAnalysis, score: float) -> list[int]:
    """The sample indices of the gallery: the worst images of each kind of error, and of each class in it, in turn.

    A false detection is worse the higher its score is; a box that has no right detection above `score` is worse the
    larger it is. There are at most MAX_IMAGES images, with at most MAX_BOXES boxes and detections.
    """
    groups = collections.defaultdict(list)  # (weight, index) of each error
    for index, one in analysis.images.items():
        annotations, hit = dataset.load_annotations(index), set()
        true_labels, areas = annotations[:, 4].tolist(), (annotations[:, 2:4] - annotations[:, :2]).prod(axis=1)
        found = one.kinds.tolist(), one.targets.tolist(), one.detections.scores.tolist(), one.detections.labels.tolist()
        for kind, target, weight, label in zip(*found, strict=True):
            if kind != "right":
                groups[kind].append((weight, index))
                groups[kind, label, kind == "class" and true_labels[target]].append((weight, index))
            elif weight > score:
                hit.add(target)
        for box, (label, area, near) in enumerate(zip(true_labels, areas.tolist(), one.near.tolist(), strict=True)):
            for kind, applies in (("missing", box not in hit), ("odd", near <= NEAR_IOU)):
                if applies:
                    groups[kind].append((area, index))
                    groups[kind, label].append((area, index))
    queues = [heapq.nlargest(MAX_IMAGES, group) for group in sorted(groups.values(), key=len, reverse=True)]
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    chosen = list(dict.fromkeys(entry[1] for entry in rounds if entry))[:MAX_IMAGES]
    boxes = np.cumsum([len(analysis.images[i].kinds) + len(analysis.images[i].near) for i in chosen])
    return chosen[: max(1, int((boxes <= MAX_BOXES).sum()))]


Saved = tuple[str, tuple[int, int]] | tuple[None, None]  # name, and height and width before downscaling


def _save_images(dataset: DetectionDataset, indices: Sequence[int], folder: Path) -> list[Saved]:
    """Write images as JPEG to a folder, in place of an earlier report's; (None, None) for those that are unreadable."""
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link; remove it, or choose another folder")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("image_[0-9][0-9][0-9].jpg"):
        old.unlink()
    paths = [folder / f"image_{number:03}.jpg" for number in range(len(indices))]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(partial(_save_image, dataset, MAX_BYTES // max(1, len(indices))), indices, paths))


def _save_image(dataset: DetectionDataset, budget: int, index: int, path: Path) -> Saved:
    """Write one image, if possible in at most `budget` bytes."""
    try:
        pixels = dataset.load_image(index)
    except (UserError, OSError):
        return None, None
    image = Image.fromarray(pixels)
    for side, quality in QUALITIES:
        image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2)
        image.save(path, quality=quality)
        if path.stat().st_size <= budget:
            break
    return path.name, pixels.shape[:2]


def _image_entry(
    dataset: DetectionDataset, index: int, one: errors.ImageErrors, saved: Saved, steps: np.ndarray
) -> dict[str, Any]:
    """The page's data about an image; boxes are rounded to tenths of its pixels.

    For each detection: x1, y1, x2, y2, label, score, kind, the box that it found or should have found, the one that it
    took (-1: none, -2: its score is too low for the confusion matrix), and the number of steps below its score. For
    each ground-truth box: x1, y1, x2, y2, label, the highest IoU with a detection, and where the box is in its file.
    """
    annotations, regions = dataset.load_annotations(index), dataset.load_difficult(index)
    scores, boxes = one.detections.scores.double().numpy(), one.detections.boxes.double().numpy()
    rows = range(dataset.offsets[index], dataset.offsets[index + 1])
    name, size = saved
    if size is None:  # the declared size or, if that is unknown too, room for all boxes
        known = dataset.known_sizes[index]
        corners = np.concatenate([annotations[:, 2:4], regions[:, 2:4], boxes[:, 2:].clip(0, 1e5)])
        size = known if known.all() else np.ceil(corners.max(axis=0, initial=1))[::-1]
    taken = np.full(len(boxes), -2)
    taken[: len(one.taken)] = one.taken
    levels = np.searchsorted(steps, scores)
    columns = one.detections.labels, _finite(scores, 4), one.kinds, one.targets, taken, levels
    columns = (np.asarray(column).tolist() for column in columns)
    truth = annotations[:, 4].astype(int).tolist(), _finite(one.near, 3)
    return {
        "path": escaped(dataset.expected_path(index)),
        "file": name,
        "size": [int(side) for side in size],
        "found": [[*box, *rest] for box, *rest in zip(_finite(boxes, 1), *columns, strict=True)],
        "truth": [
            [*box, label, near, escaped(dataset.annotation_name(row))]
            for box, label, near, row in zip(_finite(annotations[:, :4], 1), *truth, rows, strict=True)
        ],
        "ignored": _finite(regions[:, :4], 1),
    }


def _finite(values: np.ndarray, digits: int) -> list:
    """Rounded numbers without infinity and NaN, which JSON cannot hold."""
    return np.nan_to_num(np.asarray(values, dtype=np.float64)).clip(-1e9, 1e9).round(digits).tolist()


def _training_curves(entries: Sequence[Mapping[str, float]]) -> dict[str, list]:
    """Losses and AP over the epochs of a log: for each chart, (name, points) of its lines."""
    epochs, charts = [entry for entry in entries if "step" not in entry], {}
    for chart, keys in (("loss", ("class_loss", "box_loss")), ("ap", ("AP", "AP50"))):
        points = [[(one["epoch"] + 1, one[key]) for one in epochs if 0 <= one.get(key, -1) < np.inf] for key in keys]
        if any(points):
            charts[chart] = [(key.replace("_", " "), line) for key, line in zip(keys, points, strict=True) if line]
    return charts


def confusion_rows(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix as shown: its classes, the most confused ones, and its rows of (count, share of the row)."""
    background = len(names)
    between = confusion[:-1, :-1] * ~np.eye(background, dtype=bool)
    worst = np.lexsort((-confusion[:-1].sum(axis=1), -(between.sum(axis=0) + between.sum(axis=1))))[:MATRIX_LIMIT]
    labels = [*np.sort(worst).tolist(), background]
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    rows = [[(int(confusion[true, found]), float(shares[true, found])) for found in labels] for true in labels]
    titles = [*names, "background"]
    return {"labels": labels, "names": [titles[label] for label in labels], "rows": rows, "all": background}


def _statistics(dataset: DetectionDataset) -> dict[str, Any]:
    """Boxes of each class, their sizes and, if the sizes of the images are known, the positions of their centres."""
    annotations, images = dataset.annotations.astype(np.float64), dataset.image_index
    counts = np.bincount(annotations[:, 4].astype(int), minlength=dataset.num_classes())
    shown = np.argsort(-counts, kind="stable")[:BAR_LIMIT]
    sides = np.sqrt((annotations[:, 2:4] - annotations[:, :2]).clip(0).prod(axis=1))
    groups = [f"{low} to {high}" for low, high in itertools.pairwise(SIDES)] + [f"over {SIDES[-1]} px"]
    try:
        sizes = np.asarray(dataset.image_sizes)[images]
    except (UserError, OSError):  # results files can be scored without images
        positions = None
    else:
        centres = (annotations[:, 1::-1] + annotations[:, 3:1:-1]) / 2 / sizes  # y, x
        positions = np.histogram2d(*centres.clip(0, 1).T, bins=GRID, range=((0, 1), (0, 1)))[0].astype(int).tolist()
    return {
        "boxes": len(annotations),
        "empty": len(dataset) - len(np.unique(images)),
        "classes": [(dataset.labels[label], int(counts[label])) for label in shown.tolist()],
        "sizes": list(zip(groups, np.histogram(sides, [*SIDES, np.inf])[0].tolist(), strict=True)),
        "positions": positions,
    }
