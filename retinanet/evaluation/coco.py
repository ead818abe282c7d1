"""COCO's twelve numbers, by pycocotools, for any data set."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from retinanet.boxes import xywh_to_xyxy, xyxy_to_xywh
from retinanet.data.coco import load_json, quiet_coco
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError
from retinanet.inference import detect_dataset
from retinanet.postprocess import Detections
from retinanet.process import log, show_log

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def ground_truth(dataset: DetectionDataset) -> COCO:
    """A data set's boxes as a COCO object; COCO data bring their own, with crowds and areas.

    Difficult boxes are ignored as crowds are: who finds them neither gains nor loses.
    """
    if hasattr(dataset, "coco"):
        return dataset.coco
    annotations = []
    for index, image_id in enumerate(dataset.image_ids):
        for rows, is_crowd in ((dataset.load_annotations(index), 0), (dataset.load_difficult(index), 1)):
            for x1, y1, x2, y2, label in rows.tolist():
                width, height = x2 - x1, y2 - y1
                annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label)}
                annotation |= {"bbox": [x1, y1, width, height], "area": width * height, "iscrowd": is_crowd}
                annotations.append(annotation)
    return quiet_coco(
        {
            "images": [{"id": image_id} for image_id in dataset.image_ids],
            "categories": [{"id": label, "name": name} for label, name in dataset.labels.items()],
            "annotations": annotations,
        }
    )


def category_ids(dataset: DetectionDataset) -> dict[int, int]:
    """Label -> COCO's category id; the label itself, where the data are not COCO's."""
    return getattr(dataset, "coco_labels", {label: label for label in dataset.labels})


def coco_results(dataset: DetectionDataset, detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """Detections in COCO's results format.

    Args:
        dataset: gives image ids and category ids.
        detections: of each sample index, boxes in pixels of the original image.

    Returns:
        One dict a detection: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
    """
    ids, results = category_ids(dataset), []
    for index, (scores, labels, boxes) in sorted(detections.items()):
        for score, label, box in zip(scores.tolist(), labels.tolist(), xyxy_to_xywh(boxes).tolist(), strict=True):
            results.append(
                {
                    "image_id": dataset.image_ids[index],
                    "category_id": ids[label],
                    "bbox": box,
                    "score": score,
                }
            )
    return results


class ClassScore(NamedTuple):
    """COCO's numbers of one class, over all areas and with 100 detections an image; -1 without boxes."""

    name: str
    AP: float
    AP50: float
    AR: float
    boxes: int


class Scores(NamedTuple):
    """What COCO's protocol says of a detector.

    Attributes:
        metrics: the twelve METRICS, from 0 to 1; -1 where there is no ground truth of that size.
        classes: each class alone, in the order of the category ids.
        precision: [10, 101, K] at the IoUs 0.5, 0.55, ... 0.95 and the recalls 0, 0.01, ... 1; -1 without boxes.
    """

    metrics: dict[str, float]
    classes: list[ClassScore]
    precision: np.ndarray


def score(truth: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> Scores:
    """Compare detections with the ground truth, as COCO does.

    Args:
        truth: from `ground_truth`.
        results: from `coco_results` or `read_results`.
        image_ids: the images that count, with or without detections.
    """
    annotations = []
    for number, result in enumerate(results, start=1):
        width, height = result["bbox"][2:]
        annotations.append({**result, "id": number, "iscrowd": 0, "area": width * height})
    found = quiet_coco({**truth.dataset, "annotations": annotations})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.imgIds = list(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoUs, recalls, K]: all areas, 100 detections
    recall = evaluation.eval["recall"][:, :, 0, -1]  # [IoUs, K]
    counted = set(image_ids)
    classes = []
    for column, category_id in enumerate(evaluation.params.catIds):
        boxes = truth.loadAnns(truth.getAnnIds(catIds=[category_id], iscrowd=False))
        classes.append(
            ClassScore(
                truth.cats[category_id]["name"],
                float(precision[:, :, column].mean()),
                float(precision[0, :, column].mean()),
                float(recall[:, column].mean()),
                sum(box["image_id"] in counted for box in boxes),
            )
        )
    metrics = dict(zip(METRICS, np.asarray(evaluation.stats).tolist(), strict=True))
    return Scores(metrics, classes, precision)


def recall_precision(scores: Scores, iou_row: int) -> dict[str, np.ndarray]:
    """Each class's precision-recall curve at one IoU: name -> [2, 101]; empty for a class without boxes.

    Args:
        scores: from `score`.
        iou_row: 0 for IoU 0.5, 5 for 0.75.
    """
    recalls = np.linspace(0, 1, scores.precision.shape[1])
    curves = {}
    for column, row in enumerate(scores.classes):
        shown = slice(None) if row.boxes else slice(0)
        curves[row.name] = np.stack([recalls, scores.precision[iou_row, :, column]])[:, shown]
    return curves


def read_results(path: str | Path, truth: COCO) -> list[dict[str, Any]]:
    """Read a COCO results file, of whatever detector.

    Args:
        path: a JSON list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`.
        truth: whose images and categories the entries must name.

    Raises:
        UserError: the file is missing or broken; the message names the first entry that is wrong.
    """
    results = load_json(Path(path))
    if not isinstance(results, list):
        raise UserError(f"{path}: is not a list of detections")
    for number, entry in enumerate(results):
        problem = _problem_of(entry, truth)
        if problem:
            raise UserError(f"{path}: entry {number}: {problem}")
    return results


def _problem_of(entry: Any, truth: COCO) -> str | None:
    """What is wrong with an entry of a results file; None if nothing is."""
    if not isinstance(entry, dict):
        return f"is no detection: {entry!r:.80}"
    for key, known, name in (("image_id", truth.imgs, "image"), ("category_id", truth.cats, "category")):
        value = entry.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value not in known:
            return f"there is no {name} {value!r:.80} in the ground truth"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox must be 4 numbers (x, y, width, height), not {box!r:.80}"
    if not _is_number(entry.get("score")):
        return f"score must be a number, not {entry.get('score')!r:.80}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def detections_of(dataset: DetectionDataset, results: Sequence[dict[str, Any]]) -> dict[int, Detections]:
    """The inverse of `coco_results`: best first, with an entry for every image of the data set."""
    position = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    labels = {category_id: label for label, category_id in category_ids(dataset).items()}
    rows: dict[int, list] = {index: [] for index in range(len(dataset))}
    for entry in results:
        rows[position[entry["image_id"]]].append((entry["score"], labels[entry["category_id"]], *entry["bbox"]))
    detections = {}
    for index, found in rows.items():
        table = torch.tensor(sorted(found, key=lambda row: -row[0])).reshape(-1, 6)
        detections[index] = Detections(table[:, 0], table[:, 1].long(), xywh_to_xyxy(table[:, 2:]))
    return detections


def evaluate_coco(dataset: DetectionDataset, model: nn.Module, threshold: float = 0.05) -> dict[str, float]:
    """Run a model over a data set and log COCO's twelve numbers; the original's interface.

    The model is in the mode that it was in afterwards.

    Args:
        dataset: any data set, with a Resizer among its transforms.
        model: a RetinaNet, or a DataParallel around it.
        threshold: scores must be above it.

    Returns:
        The METRICS.
    """
    show_log()
    found = detect_dataset(model, dataset, score_threshold=threshold)
    metrics = score(ground_truth(dataset), coco_results(dataset, found), dataset.image_ids).metrics
    log.info("%s", metrics_table(metrics))
    return metrics


def metrics_table(metrics: Mapping[str, float]) -> str:
    """The twelve numbers as two lines of text."""
    cells = [f"{name} {metrics[name]:.3f}" for name in METRICS]
    return "  ".join(cells[:6]) + "\n" + "  ".join(cells[6:])


def class_table(classes: Sequence[ClassScore]) -> str:
    """A line of text for each class; a dash where it has no boxes."""
    width = max(5, *(len(row.name) for row in classes))
    lines = [f"{'class':{width}}     AP   AP50     AR   boxes"]
    for name, *values, boxes in classes:
        cells = (f"{value:.3f}" if boxes else "-" for value in values)
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>5}" for cell in cells) + f"  {boxes:6d}")
    return "\n".join(lines)
