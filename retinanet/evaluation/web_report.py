"""report.html: what a detector gets wrong, and above which score to use it, as a page that needs no server.

The page and the folder `report` beside it, with JPEG images, are all that it takes; the boxes are drawn by the browser,
so that its slider moves them. The template, style sheet and script are in `page/`.
"""

import datetime
import itertools
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from retinanet.evaluation.thresholds import Point, Ranking, best_f1, counts_above

MAX_IMAGES, MAX_BOXES = 300, 60_000  # of the gallery
MAX_BYTES = 40_000_000  # of all JPEG files
# Long side in pixels and JPEG quality, from the best: an image gets the first pair whose file is small enough.
QUALITIES = ((1280, 82), (1280, 65), (960, 60), (640, 50), (320, 40))
STEPS = 100  # of the slider, besides the scores of the best F1 of all and of the first BEST_LIMIT classes
BEST_LIMIT = 100
MATRIX_LIMIT = 20  # classes of the confusion matrix: those that are confused most
BAR_LIMIT = 40  # classes of the chart of boxes
NEAR_IOU = 0.1  # a box that no detection overlaps by more may be wrong itself
SIDES = (0, 16, 32, 64, 96, 128, 256, 512)  # pixels, the root of the area
CURVE_LIMIT = 24  # classes whose curves are drawn: the most frequent ones
# Of their lines; told apart by colour-blind readers, on light and dark ground.
COLOURS = ("#1f83c8", "#d95f02", "#0f9b74", "#c266a0", "#b8860b", "#7a6fd0", "#3aa7b8")
DASHES = ("none", "7 3", "2 3", "10 3 2 3")
GRID = 24  # cells a side of the map of positions

# Of each of errors.KINDS, its title and what it is.
KINDS = {
    "class": ("Wrong class", "The box fits an object, but of another class."),
    "location": ("Badly placed", "The class is right, but the box overlaps its object only by an IoU of 0.1 to 0.5."),
    "both": ("Wrong class, badly placed", "The box overlaps an object of another class, and not enough either."),
    "duplicate": ("Duplicate", "A better detection has already found this object."),
    "background": (
        "Nothing annotated",
        "It overlaps no annotated object: a false alarm, or an annotation is missing.",
    ),
    "missed": ("Never found", "No detection, however low its score, found this object or came close to it."),
}


def write(
    path: Path,
    evaluation: Evaluation,
    source: str,
    is_model: bool,
    training: Sequence[Mapping[str, float]] = (),
    anchors: Mapping[str, Any] | None = None,
) -> None:
    """Write the page and the images of the folder `report` beside it; those of an earlier one are removed.

    Args:
        path: of the page, report.html; its folder exists.
        evaluation: detections and their scores.
        source: the file of the model, or else of the detections.
        is_model: whether it is that of a model.
        training: the entries of the run's log.jsonl.
        anchors: the `summary` of `anchor_report`, and the `coverage` of its `as_dict`.

    Raises:
        UserError: something lies at the place of the files that must not be overwritten.
        OSError: a file cannot be written.
    """
    page, images = output_file(path), path.parent / "report"
    if images.is_symlink():
        raise UserError(f"{images}: is a link; remove it, or choose another folder")
    images.mkdir(exist_ok=True)
    for old in images.glob("image_[0-9][0-9][0-9].jpg"):
        old.unlink()
    dataset, limit = evaluation.dataset, evaluation.limit
    analysis = evaluation.errors or errors.analyse(dataset, evaluation.detections, limit)
    rankings = voc.all_rankings(evaluation.voc)
    points = list(map(best_f1, rankings))
    chosen = choose_images(dataset, analysis, points[-1].score if points[-1] else 0.5)
    paths = [images / f"image_{number:03}.jpg" for number in range(len(chosen))]
    budget = MAX_BYTES // max(1, len(chosen))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        sizes = list(threads.map(_save_image, itertools.repeat(dataset), chosen, paths, itertools.repeat(budget)))
    steps = score_steps(rankings, points)
    data = {
        "names": [escaped(name) for name in dataset.labels.values()],
        **steps,
        "iou": evaluation.iou_threshold,
        "surely": errors.CONFUSION_SCORE,
        "near": NEAR_IOU,
        "kinds": {"right": "Right"} | {kind: title for kind, (title, _) in KINDS.items()},
        "styles": _line_styles(steps["boxes"]),
        "images": [
            _image_entry(dataset, index, analysis.images[index], size, path.name, np.array(steps["steps"]))
            for index, size, path in zip(chosen, sizes, paths, strict=True)
        ],
        "training": _training_charts(training),
    }
    about = {
        "Model" if is_model else "Detections": source if is_model else f"{source}; the model is not known",
        "Data": dataset.source,
        "Command": shlex.join(sys.argv),
        "Date": f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        "Versions": f"retinanet {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("retinanet.evaluation", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    text = environment.get_template("report.html").render(
        source=escaped(source),
        data_set=escaped(dataset.source),
        about={title: escaped(text) for title, text in about.items()},
        metrics=evaluation.coco.metrics,
        classes=_class_rows(evaluation, points),
        errors=[(kind, *KINDS[kind], analysis.counts[kind], analysis.lost[kind]) for kind in errors.KINDS],
        ap50=analysis.ap50,
        matrix=confusion_rows(analysis.confusion, data["names"]),
        statistics=_statistics(evaluation.scored),
        num_images=len(evaluation.detections),
        anchors=anchors,
        data=data,
    )
    page.write_text(text, encoding="utf-8", errors="replace")


def score_steps(rankings: Sequence[Ranking], points: Sequence[Point | None]) -> dict[str, Any]:
    """What the slider shows: detections and right ones of each ranking, the last of which is of all, at each step.

    Args:
        rankings: from `voc.all_rankings`.
        points: the best F1 of each.

    Returns:
        `steps`, rising scores; `counts` and `right`, for each ranking the differences from one step to the next, of
        which most are 0; `boxes` of each ranking; `best`, the step of each one's best F1, or None; `start`.
    """
    scores = rankings[-1].scores.clip(-1e9, 1e9)
    low, high = scores.min(initial=0), scores.max(initial=1)
    if (low, high) == (0, 1):
        grid = np.arange(STEPS + 1) / STEPS
    else:  # results files may hold any numbers
        margin = (high - low) / STEPS
        grid = np.array([float(f"{score:.4g}") for score in np.linspace(low - margin, high, STEPS + 1)])
    marked = [point.score for point in [*points[:-1][:BEST_LIMIT], points[-1]] if point and np.isfinite(point.score)]
    steps = np.unique(np.concatenate([grid, marked]))
    places = {score: place for place, score in enumerate(steps.tolist())}
    best = [point and places.get(point.score) for point in points]
    tables = np.stack([counts_above(ranking, steps) for ranking in rankings])  # [K + 1, 2, T]
    changes = np.diff(tables, prepend=0)
    return {
        "steps": steps.tolist(),
        "counts": changes[:, 0].tolist(),
        "right": changes[:, 1].tolist(),
        "boxes": [int(ranking.boxes.sum()) for ranking in rankings],
        "best": best,
        "start": int(np.abs(steps - 0.5).argmin()) if best[-1] is None else best[-1],
    }


def choose_images(dataset: DetectionDataset, analysis: errors.ErrorAnalysis, threshold: float) -> list[int]:
    """The sample indices of the gallery: those with the worst errors of each kind, and of each class in it.

    False detections are the worse the higher their score, boxes that have no right detection above the `threshold`
    the larger they are. At most MAX_IMAGES, and not more of them than hold MAX_BOXES.
    """
    numbers, classes = {kind: number for number, kind in enumerate(("right", *errors.KINDS))}, dataset.num_classes()
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for index, one in analysis.images.items():
        annotations = dataset.load_annotations(index)
        true_labels = annotations[:, 4].astype(int)
        scores, labels = one.detections.scores.numpy(), one.detections.labels.numpy()
        kinds = np.array([numbers[kind] for kind in one.kinds], dtype=int)
        # Each confusion of two classes is a group of its own.
        groups = labels + classes * (1 + np.append(true_labels, -1)[one.targets]) * (kinds == numbers["class"])
        found = one.targets[(kinds == 0) & (scores > threshold)]
        lost = ~np.isin(np.arange(len(annotations)), found)
        areas = (annotations[:, 2:4] - annotations[:, :2]).prod(axis=1)
        wrong, odd = kinds > 0, one.near <= NEAR_IOU
        for kind, label, weight in (
            (kinds[wrong], groups[wrong], scores[wrong]),
            (np.full(lost.sum(), numbers["missed"]), true_labels[lost], areas[lost]),
            (np.full(odd.sum(), len(numbers)), true_labels[odd], areas[odd]),
        ):
            for column, values in zip(columns, (kind, label, weight, np.full(len(kind), index)), strict=True):
                column.append(values)
    kinds, groups, weights, images = map(np.concatenate, columns)
    # First the worst of each kind and the worst of each group, of frequent groups first, then the second ones, ...
    of_group, sizes = _ranks(kinds * (classes + 1) ** 2 + groups, weights)
    order = np.lexsort((-sizes, np.minimum(_ranks(kinds, weights)[0], of_group)))
    _, first = np.unique(images[order], return_index=True)
    chosen = images[order][np.sort(first)[:MAX_IMAGES]].astype(int).tolist()
    boxes = np.cumsum([len(analysis.images[i].kinds) + len(analysis.images[i].near) for i in chosen])
    return chosen[: max(1, int((boxes <= MAX_BOXES).sum()))]


def _ranks(groups: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] the place of each weight, from the largest, within its group, and [N] the group's size."""
    order = np.lexsort((-weights, groups))
    _, starts, inverse, sizes = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    ranks, group_sizes = np.empty((2, len(groups)), dtype=int)
    ranks[order], group_sizes[order] = np.arange(len(groups)) - starts[inverse], sizes[inverse]
    return ranks, group_sizes


def _save_image(dataset: DetectionDataset, index: int, path: Path, budget: int) -> tuple[int, int] | None:
    """Write an image as JPEG of at most `budget` bytes, if that can be; (height, width), or None if unreadable."""
    try:
        pixels = dataset.load_image(index)
    except (UserError, OSError):
        return None
    image = Image.fromarray(pixels)
    for side, quality in QUALITIES:
        image.thumbnail((side, side), Image.Resampling.BILINEAR, reducing_gap=2)
        image.save(path, quality=quality)
        if path.stat().st_size <= budget:
            break
    return pixels.shape[:2]


def _image_entry(
    dataset: DetectionDataset,
    index: int,
    one: errors.ImageErrors,
    size: tuple[int, int] | None,
    name: str,
    steps: np.ndarray,
) -> dict[str, Any]:
    """What the page knows of an image; boxes are rounded to tenths of its pixels.

    Of each detection: x1, y1, x2, y2, label, score, kind, the box that it found or should have found, the one that it
    took (-1: none, -2: too low a score for the confusion matrix), and the number of steps that its score is above. Of
    each box of the ground truth: x1, y1, x2, y2, label, the best IoU of any detection, and its place in its file.
    """
    annotations, regions = dataset.load_annotations(index), dataset.load_difficult(index)
    scores, boxes = one.detections.scores.double().numpy(), one.detections.boxes.double().numpy()
    rows = range(dataset.offsets[index], dataset.offsets[index + 1])
    file = name if size else None
    if size is None:  # room for all boxes, where not even the declared size is known
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
        "file": file,
        "size": [int(side) for side in size],
        "found": [[*box, *rest] for box, *rest in zip(_finite(boxes, 1), *columns, strict=True)],
        "truth": [
            [*box, label, near, escaped(dataset.annotation_name(row))]
            for box, label, near, row in zip(_finite(annotations[:, :4], 1), *truth, rows, strict=True)
        ],
        "ignored": _finite(regions[:, :4], 1),
    }


def _finite(values: np.ndarray, digits: int) -> list:
    """Rounded numbers, as JSON can hold them."""
    return np.nan_to_num(np.asarray(values, dtype=np.float64)).clip(-1e9, 1e9).round(digits).tolist()


def _line_styles(boxes: Sequence[int]) -> dict[int, dict[str, str]]:
    """How the curves of the most frequent classes are drawn, and in black that of all, the last one."""
    frequent = np.argsort(-np.array(boxes[:-1]), kind="stable")[:CURVE_LIMIT].tolist()
    looks = itertools.product(DASHES, COLOURS)
    styles = {label: {"colour": colour, "dash": dash} for label, (dash, colour) in zip(frequent, looks, strict=False)}
    return styles | {len(boxes) - 1: {"colour": "var(--ink)", "dash": "none"}}


def _training_charts(entries: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    """Losses and AP over the epochs of a log, as the page draws them; nothing without an epoch."""
    epochs = [entry for entry in entries if "step" not in entry]
    charts = []
    for name, keys in (("loss", ("class_loss", "box_loss")), ("ap", ("AP", "AP50"))):
        lines = [
            {
                "name": key.replace("_", " "),
                "colour": colour,
                "points": [(e["epoch"] + 1, e[key]) for e in epochs if np.isfinite(e.get(key, np.nan))],
            }
            for key, colour in zip(keys, COLOURS, strict=False)
        ]
        lines = [line for line in lines if line["points"]]
        top = 1 if name == "ap" else 1.05 * max((y for line in lines for _, y in line["points"]), default=1)
        if lines:
            charts.append({"id": name, "high": epochs[-1]["epoch"] + 1, "top": max(top, 0.1), "lines": lines})
    return charts


def _class_rows(evaluation: Evaluation, points: Sequence[Point | None]) -> list[dict[str, Any]]:
    """The rows of the table of classes, the lowest AP first; numbers that do not exist are None."""
    rows = [
        {
            "label": label,
            "name": escaped(row.name),
            **{name: getattr(row, name) if row.boxes else None for name in ("AP", "AP50", "AR")},
            "F1": point and point.f1,
            "score": point and point.score,
            "boxes": row.boxes,
        }
        for label, (row, point) in enumerate(zip(evaluation.coco.classes, points[:-1], strict=True))
    ]
    return sorted(rows, key=lambda row: (row["AP"] is None, row["AP"]))


def confusion_rows(confusion: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The classes of the matrix that is shown, the most confused ones, and its rows: (count, share of the row)."""
    background = len(names)
    between = confusion[:-1, :-1] * ~np.eye(background, dtype=bool)
    worst = np.lexsort((-confusion[:-1].sum(axis=1), -(between.sum(axis=0) + between.sum(axis=1))))[:MATRIX_LIMIT]
    labels = [*np.sort(worst).tolist(), background]
    totals = np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = np.stack([confusion, confusion / totals], axis=2)[np.ix_(labels, labels)]
    rows = [[(int(count), float(share)) for count, share in row] for row in cells]
    titles = [*names, "background"]
    return {"labels": labels, "names": [titles[label] for label in labels], "rows": rows, "all": background}


def _statistics(dataset: DetectionDataset) -> dict[str, Any]:
    """Boxes of each class, their sizes and, where the sizes of the images are known, the positions of their centres."""
    annotations, images = dataset.annotations.astype(np.float64), dataset.image_index
    counts = np.bincount(annotations[:, 4].astype(int), minlength=dataset.num_classes())
    shown = np.argsort(-counts, kind="stable")[:BAR_LIMIT]
    sides = np.sqrt((annotations[:, 2:4] - annotations[:, :2]).clip(0).prod(axis=1))
    groups = [f"{low} to {high}" for low, high in itertools.pairwise(SIDES)] + [f"over {SIDES[-1]} px"]
    by_size = np.bincount(np.digitize(sides, SIDES) - 1, minlength=len(groups))
    try:
        sizes = np.asarray(dataset.image_sizes)[images]
    except (UserError, OSError):  # results files are scored without images
        positions = None
    else:
        centres = (annotations[:, :2] + annotations[:, 2:4]) / 2 / sizes[:, ::-1]
        cells = (centres * GRID).clip(0, GRID - 1).astype(int)
        positions = np.bincount(cells[:, 1] * GRID + cells[:, 0], minlength=GRID**2).reshape(GRID, GRID).tolist()
    return {
        "boxes": len(annotations),
        "empty": len(dataset) - len(np.unique(images)),
        "classes": [(escaped(dataset.labels[label]), int(counts[label])) for label in shown.tolist()],
        "sizes": list(zip(groups, by_size.tolist(), strict=True)),
        "positions": positions,
    }
