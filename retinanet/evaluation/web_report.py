"""report.html: a page that shows what a detector gets wrong and which score threshold to use; it needs no server.

It consists of the page and of the folder `report` beside it, with JPEG images. Python counts detections
(`score_steps`), and chooses and describes the images (`gallery`). The template, style sheet and script are in `page/`.
The script draws curves and boxes and finds the cases of each kind of mistake, so that they follow the slider.
"""

import datetime
import itertools
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from retinanet import __version__
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError, escaped, output_file
from retinanet.evaluation import errors, gallery, voc
from retinanet.evaluation.report import Evaluation
from retinanet.evaluation.thresholds import Point, Ranking, best_f1, counts_above, threshold

STEPS, RANKS = 100, 20  # steps of the slider: at equal distances, and at equal numbers of detections
BEST_LIMIT, CURVE_LIMIT = 100, 7  # classes whose best F1 is a step, and whose curves are drawn
MATRIX_LIMIT, BAR_LIMIT = 20, 40  # classes in the confusion matrix, and in the chart of boxes
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
    chosen = gallery.choose_images(dataset, analysis, points[-1].score if points[-1] else 0.5)
    images, levels = [], np.array(steps["steps"])
    for index, saved in zip(chosen, gallery.save_images(dataset, chosen, folder), strict=True):
        images.append(gallery.image_entry(dataset, index, analysis.images[index], saved, levels))
    data = {
        "names": names,
        **steps,
        "iou": evaluation.iou_threshold,
        "near": gallery.NEAR_IOU,
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
