"""COCO's twelve numbers, by pycocotools, for any data set."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet.boxes import xyxy_to_xywh
from retinanet.datasets import DetectionDataset
from retinanet.postprocess import Detections

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def quiet_coco(content: dict[str, Any]) -> COCO:
    """Pycocotools' COCO object from the content of an annotation file, without its messages."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def ground_truth(dataset: DetectionDataset) -> COCO:
    """A data set's boxes as a COCO object; COCO data bring their own, with crowds and areas."""
    if hasattr(dataset, "coco"):
        return dataset.coco
    annotations = []
    for index, image_id in enumerate(dataset.image_ids):
        for x1, y1, x2, y2, label in dataset.load_annotations(index).tolist():
            width, height = x2 - x1, y2 - y1
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(label), "iscrowd": 0}
            annotations.append(annotation | {"bbox": [x1, y1, width, height], "area": width * height})
    return quiet_coco(
        {
            "images": [{"id": image_id} for image_id in dataset.image_ids],
            "categories": [{"id": label, "name": name} for label, name in dataset.labels.items()],
            "annotations": annotations,
        }
    )


def coco_results(dataset: DetectionDataset, detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """Detections in COCO's results format.

    Args:
        dataset: gives image ids and category ids.
        detections: of each sample index, boxes in pixels of the original image.

    Returns:
        One dict a detection: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
    """
    category_ids = getattr(dataset, "coco_labels", None) or {label: label for label in dataset.labels}
    results = []
    for index, (scores, labels, boxes) in sorted(detections.items()):
        for score, label, box in zip(scores.tolist(), labels.tolist(), xyxy_to_xywh(boxes).tolist(), strict=True):
            results.append(
                {
                    "image_id": dataset.image_ids[index],
                    "category_id": category_ids[label],
                    "bbox": box,
                    "score": score,
                }
            )
    return results


def score(truth: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> dict[str, float]:
    """COCO's twelve numbers.

    Args:
        truth: from `ground_truth`.
        results: from `coco_results`.
        image_ids: the images that count, with or without detections.

    Returns:
        The METRICS, from 0 to 1; -1 where there is no ground truth of that size.
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
    return dict(zip(METRICS, np.asarray(evaluation.stats).tolist(), strict=True))


def metrics_table(metrics: Mapping[str, float]) -> str:
    """The twelve numbers as two lines of text."""
    cells = [f"{name} {metrics[name]:.3f}" for name in METRICS]
    return "  ".join(cells[:6]) + "\n" + "  ".join(cells[6:])
