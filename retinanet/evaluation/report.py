"""All scores of a detector at once, as text and as files."""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import counted
from retinanet.errors import UserError, output_file
from retinanet.evaluation import coco, errors, thresholds, voc
from retinanet.postprocess import MAX_DETECTIONS, Detections
from retinanet.visual import charts

FILES = ("detections.json", "metrics.json")
JSON_SCORES = np.arange(20) / 20  # thresholds for which metrics.json has precision, recall and F1


@dataclass
class Evaluation:
    """Scores of detections (best first, boxes in pixels of the original image) by COCO's and Pascal VOC's protocols."""

    dataset: DetectionDataset  # the ground truth
    detections: Mapping[int, Detections]  # by sample index; other images do not count
    iou_threshold: float = 0.5  # smallest IoU at which a box counts as found, for VOC's scores
    eleven_points: bool = False  # average precision as in VOC 2007
    analyse: bool = False  # also find out what costs AP
    # From `coco.read_results`, if the detections are from a file: COCO's protocol scores them unchanged.
    results: Sequence[Mapping[str, Any]] | None = None
    limit: int = MAX_DETECTIONS  # detections of a class in an image that COCO's protocol and the analysis count
    min_precision: float | None = None  # also find the lowest scores that have this precision

    def __post_init__(self):
        dataset, found, indices = self.dataset, self.detections, sorted(self.detections)
        self.limits_note = limits_note(dataset, indices, self.limit, by_class=self.results is not None)
        self.results = coco.coco_results(dataset, found) if self.results is None else self.results
        self.coco = coco.score_results(dataset, self.results, indices, self.limit)
        self.voc = voc.evaluate_detections(dataset, found, self.iou_threshold, self.eleven_points)
        self.errors = errors.analyse(dataset, found, self.limit) if self.analyse else None

    @cached_property
    def scored(self) -> DetectionDataset:
        """The data set without the images that do not count."""
        if len(self.detections) == len(self.dataset):
            return self.dataset
        scored = copy.copy(self.dataset)
        scored.select_images(np.isin(np.arange(len(scored)), list(self.detections)))
        return scored

    def text(self) -> str:
        """All tables."""
        count = sum(len(one.scores) for one in self.detections.values())
        total = f"{counted(len(self.detections), 'image')}, {counted(count, 'detection')}"
        tables = [
            "\n".join(filter(None, [total, coco.metrics_table(self.coco.metrics), self.limits_note])),
            coco.class_table(self.coco.classes),
            f"at IoU {self.iou_threshold:g}:\n{voc.class_table(self.voc, self.dataset, self.min_precision)}",
        ]
        if self.errors:
            tables += [errors.error_table(self.errors), errors.confusion_table(self.errors, list(self.dataset.classes))]
        return "\n\n".join(tables)

    def metrics(self) -> dict:
        """All numbers, by name."""
        *points, over_all = map(self._operating_points, voc.all_rankings(self.voc))
        classes = []
        for row, result, of_class in zip(self.coco.classes, self.voc.values(), points, strict=True):
            of_voc = {"VOC_AP": result.average_precision, "precision": result.precision, "recall": result.recall}
            classes.append(row._asdict() | of_voc | of_class)
        content = {**self.coco.metrics, "mAP": voc.mean_average_precision(self.voc), **over_all, "classes": classes}
        if self.errors:
            content["errors"] = {"AP50": self.errors.ap50, "counts": self.errors.counts, "lost_AP": self.errors.lost}
            content["confusion"] = self.errors.confusion.tolist()
        return content

    def _operating_points(self, ranking: thresholds.Ranking) -> dict:
        """Thresholds of a ranking with their precision, recall and F1, by name; None if there is no such threshold."""
        points = {"best_f1": thresholds.best_f1(ranking)}
        if self.min_precision is not None:
            points["min_precision"] = thresholds.at_precision(ranking, self.min_precision)
        columns = np.stack([JSON_SCORES, *thresholds.rates_above(ranking, JSON_SCORES)]).astype(object)
        columns[columns != columns] = None  # NaN: there is no precision without detections
        above = dict(zip(("score", "precision", "recall", "f1"), columns.tolist(), strict=True))
        return {name: point and point._asdict() for name, point in points.items()} | {"above": above}

    def draw_thresholds(self, path: Path) -> None:
        """Draw precision, recall and F1 over the score, for each class and for all."""
        rankings = voc.all_rankings(self.voc)
        scores = rankings[-1].scores[np.isfinite(rankings[-1].scores)]
        grid = np.linspace(scores.min(initial=0), scores.max(initial=1), 501)
        names, rates = [*self.dataset.labels.values(), "all"], [thresholds.rates_above(one, grid) for one in rankings]
        marks = [point and point[:4] for point in map(thresholds.best_f1, rankings)]
        charts.draw_thresholds(names, grid, rates, marks, path)

    def write(self, folder: Path) -> None:
        """Write `detections.json`, in COCO's results format, and `metrics.json`."""
        for name, content in zip(FILES, (self.results, self.metrics()), strict=True):
            output_file(folder / name).write_text(json.dumps(content, indent=1))


def check_folder(folder: Path) -> None:
    """Raise a UserError if `Evaluation.write` could not write its files to `folder`."""
    for name in FILES:
        output_file(folder / name)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: nothing can be written to it ({error.strerror})") from error


def limits_note(dataset: DetectionDataset, indices: Sequence[int], limit: int, by_class: bool = False) -> str:
    """A warning if images hold more boxes than the `limit` of detections per image, or per class and image."""
    frequency = np.bincount(dataset.annotations[:, 4].astype(np.int64))
    truth, beyond, total, images = {}, 0, 0, 0
    for index in indices:
        found = dataset.load_annotations(index)
        # The rarer a class, the more each of its boxes adds to AP, so the best detector finds these first.
        found = found[np.argsort(frequency[found[:, 4].astype(np.int64)], kind="stable")]
        counts = np.unique(found[:, 4], return_counts=True)[1] if by_class else np.array([len(found)])
        lost = int((counts - limit).clip(0).sum())
        beyond, total, images = beyond + lost, total + len(found), images + bool(lost)
        found = torch.from_numpy(found if by_class else found[:limit])
        truth[index] = Detections(torch.linspace(1, 0.5, len(found)), found[:, 4].long(), found[:, :4])
    if not beyond:
        return ""
    best = coco.score(dataset, truth, limit).metrics["AP"]
    return (
        f"warning: {counted(images, 'image')} with more boxes than the {limit} detections "
        f"{'of a class ' * by_class}that count (--max_detections): at best {total - beyond:,} of "
        f"{counted(total, 'box')} can be found, which is AP {best:.3f}"
    )
