"""All scores of a detector at once, as text and as files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import counted
from retinanet.errors import output_file
from retinanet.evaluation import coco, errors, voc
from retinanet.postprocess import Detections


@dataclass
class Evaluation:
    """Detections and their scores; made by `evaluate`."""

    dataset: DetectionDataset
    detections: Mapping[int, Detections]
    results: Sequence[Mapping[str, Any]]  # the detections in COCO's results format
    iou_threshold: float  # of VOC's scores
    coco: coco.Scores
    voc: dict[int, voc.ClassResult]  # of each label
    errors: errors.ErrorAnalysis | None  # None unless asked for

    def text(self) -> str:
        """All tables."""
        count = sum(len(one.scores) for one in self.detections.values())
        total = f"{counted(len(self.detections), 'image')}, {counted(count, 'detection')}"
        tables = [
            f"{total}\n{coco.metrics_table(self.coco.metrics)}{self._beyond_cocos_limit()}",
            coco.class_table(self.coco.classes),
            f"at IoU {self.iou_threshold:g}:\n{voc.class_table(self.voc, self.dataset)}",
        ]
        if self.errors:
            tables += [errors.error_table(self.errors), errors.confusion_table(self.errors, list(self.dataset.classes))]
        return "\n\n".join(tables)

    def _beyond_cocos_limit(self) -> str:
        """A line about the boxes that COCO's protocol cannot count as found, if there are any."""
        boxes = [self.dataset.load_annotations(index)[:, 4] for index in self.detections]
        limit = errors.MAX_DETECTIONS
        lost = sum(int((np.unique(labels, return_counts=True)[1] - limit).clip(0).sum()) for labels in boxes)
        text = f"\nCOCO takes {limit} detections of a class in an image: {counted(lost, 'box')} must count as missed"
        return text if lost else ""

    def metrics(self) -> dict:
        """All numbers, by name."""
        classes = [
            {
                **row._asdict(),
                "VOC_AP": result.average_precision,
                "precision": result.precision,
                "recall": result.recall,
            }
            for row, result in zip(self.coco.classes, self.voc.values(), strict=True)
        ]
        content = {**self.coco.metrics, "mAP": voc.mean_average_precision(self.voc), "classes": classes}
        if self.errors:
            content["errors"] = {"AP50": self.errors.ap50, "counts": self.errors.counts, "lost_AP": self.errors.lost}
            content["confusion"] = self.errors.confusion.tolist()
        return content

    def write(self, folder: Path) -> None:
        """Write `detections.json`, in COCO's results format, and `metrics.json`."""
        for name, content in (("detections.json", self.results), ("metrics.json", self.metrics())):
            output_file(folder / name).write_text(json.dumps(content, indent=1))


def evaluate(
    dataset: DetectionDataset,
    detections: Mapping[int, Detections],
    iou_threshold: float = 0.5,
    eleven_points: bool = False,
    analyse: bool = False,
    results: Sequence[Mapping[str, Any]] | None = None,
) -> Evaluation:
    """Score detections, best first, boxes in pixels of the original image, by COCO's and by Pascal VOC's protocol.

    Args:
        dataset: provides the ground truth.
        detections: of each sample index that counts.
        iou_threshold: IoU from which a box counts as found, for VOC's scores.
        eleven_points: average precision as in VOC 2007.
        analyse: also find out what costs AP.
        results: from `coco.read_results`, if the detections are from a file: COCO's protocol scores them as they are.
    """
    results = coco.coco_results(dataset, detections) if results is None else results
    return Evaluation(
        dataset,
        detections,
        results,
        iou_threshold,
        coco.score_results(dataset, results, sorted(detections)),
        voc.evaluate_detections(dataset, detections, iou_threshold, eleven_points),
        errors.analyse(dataset, detections) if analyse else None,
    )
