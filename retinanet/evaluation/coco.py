"""COCO's twelve numbers, computed by pycocotools, for any data set."""

import contextlib
import io
import itertools
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torch import nn

from retinanet.boxes import xywh_to_xyxy, xyxy_to_xywh
from retinanet.data.dataset import DetectionDataset
from retinanet.data.ground_truth import quiet_coco
from retinanet.data.reading import load_json
from retinanet.detection import detect_dataset
from retinanet.errors import UserError, shortened, shown
from retinanet.postprocess import MAX_DETECTIONS, Detections
from retinanet.process import log, show_log

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def metric_names(limit: int) -> list[str]:
    """The METRICS if `limit` detections of a class in an image count: for a limit of 500, AR100 becomes AR500."""
    recalls = [f"AR{min(number, limit)}" for number in (1, 10, limit)]
    return [*METRICS[:6], *recalls, *METRICS[9:]]


class ClassScore(NamedTuple):
    """COCO's numbers of one class, over all areas and with all detections that count; -1 without boxes."""

    name: str
    AP: float
    AP50: float
    AR: float
    boxes: int


class Scores(NamedTuple):
    """COCO's scores of a detector."""

    metrics: dict[str, float]  # by `metric_names`, from 0 to 1; -1 if no ground truth has that size
    classes: list[ClassScore]  # in the order of the category ids
    # [10, 101, K] at the IoUs 0.5, 0.55, ... 0.95 and the recalls 0, 0.01, ... 1; -1 for a class without boxes
    precision: np.ndarray

    def curves(self, iou_row: int) -> dict[str, np.ndarray]:
        """Each class's precision-recall curve, [2, 101] or empty, at one IoU: row 0 is 0.5, row 5 is 0.75, ..."""
        recalls = np.linspace(0, 1, self.precision.shape[1])
        curves = {}
        for column, row in enumerate(self.classes):
            curve = np.stack([recalls, self.precision[iou_row, :, column]])
            curves[row.name] = curve if row.boxes else curve[:, :0]
        return curves


def coco_results(dataset: DetectionDataset, detections: Mapping[int, Detections]) -> list[dict[str, Any]]:
    """Convert the detections of each sample index, boxes in pixels of the original image, to COCO's results format.

    It has one dict per detection: `image_id`, `category_id`, `bbox` (x, y, width, height) and `score`.
    """
    ids, results = dataset.coco_labels, []
    for index, (scores, labels, boxes) in sorted(detections.items()):
        columns = scores.tolist(), labels.tolist(), xyxy_to_xywh(boxes).tolist()
        results += [
            {"image_id": dataset.image_ids[index], "category_id": ids[label], "bbox": box, "score": score}
            for score, label, box in zip(*columns, strict=True)
        ]
    return results


def score(dataset: DetectionDataset, detections: Mapping[int, Detections], limit: int = MAX_DETECTIONS) -> Scores:
    """Score detections by sample index, boxes in pixels of the original, as COCO does; only these images count."""
    return score_results(dataset, coco_results(dataset, detections), sorted(detections), limit)


def score_results(
    dataset: DetectionDataset,
    results: Sequence[Mapping[str, Any]],
    indices: Sequence[int],
    limit: int = MAX_DETECTIONS,
) -> Scores:
    """Score results exactly as pycocotools does, with boxes and scores unchanged.

    Difficult boxes are ignored like crowds: finding one changes no score. Only the images of `indices` count. `limit`,
    the last of pycocotools' `maxDets`, is the number of detections of a class in an image that count.
    """
    annotations = []
    for number, result in enumerate(results, start=1):
        width, height = result["bbox"][2:]
        annotations.append({**result, "id": number, "iscrowd": 0, "area": width * height})
    ground_truth = dataset.coco
    # pycocotools' own `loadRes` copies all images and fails on an empty list.
    found = quiet_coco({**ground_truth.dataset, "annotations": annotations})
    image_ids = [dataset.image_ids[index] for index in indices]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(ground_truth, found, "bbox")
        evaluation.params.imgIds = image_ids
        evaluation.params.maxDets = [min(number, limit) for number in (1, 10, limit)]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoUs, recalls, K]: all areas, `limit`
    recall = evaluation.eval["recall"][:, :, 0, -1]  # [IoUs, K]
    annotations = itertools.chain.from_iterable(ground_truth.imgToAnns[image_id] for image_id in image_ids)
    num_boxes = Counter(annotation["category_id"] for annotation in annotations if not annotation["iscrowd"])
    classes = []
    for column, category_id in enumerate(evaluation.params.catIds):
        name, of_class = ground_truth.cats[category_id]["name"], precision[:, :, column]
        numbers = of_class.mean(), of_class[0].mean(), recall[:, column].mean()
        classes.append(ClassScore(name, *map(float, numbers), num_boxes[category_id]))
    present = precision[precision > -1]
    # AP is computed here because pycocotools always reads it at 100 detections, whatever `maxDets` says.
    numbers = [float(present.mean()) if len(present) else -1.0, *np.asarray(evaluation.stats).tolist()[1:]]
    metrics = dict(zip(metric_names(limit), numbers, strict=True))
    return Scores(metrics, classes, precision)


def read_results(dataset: DetectionDataset, path: str | Path) -> list[dict[str, Any]]:
    """Read a COCO results file of any detector; the numbers keep their values.

    It is a JSON list of `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`, and must name images and
    categories of the data set; a UserError names the first wrong entry. As in pycocotools, an id may be written as
    1.0, and a number beyond the range of floats, such as 1e400, is infinite.
    """
    results = load_json(Path(path))
    if not isinstance(results, list):
        raise UserError(f"{path}: is not a list of detections")
    image_ids, category_ids = set(dataset.image_ids), set(dataset.coco_labels.values())
    for number, entry in enumerate(results):
        if problem := _find_problem(entry, image_ids, category_ids):
            raise UserError(f"{path}: entry {number}: {problem}")
    return results


def to_detections(dataset: DetectionDataset, results: Sequence[Mapping[str, Any]]) -> dict[int, Detections]:
    """The inverse of `coco_results`, in float64: the detections of every image of the data set, best first."""
    indices = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    labels = {category_id: label for label, category_id in dataset.coco_labels.items()}
    rows: dict[int, list] = {index: [] for index in range(len(dataset))}
    for entry in sorted(results, key=lambda entry: -entry["score"]):
        rows[indices[entry["image_id"]]].append((entry["score"], labels[entry["category_id"]], *entry["bbox"]))
    detections = {}
    for index, found in rows.items():
        table = torch.from_numpy(np.array(found, dtype=np.float64).reshape(-1, 6))
        detections[index] = Detections(table[:, 0], table[:, 1].long(), xywh_to_xyxy(table[:, 2:]))
    return detections


def _find_problem(entry: Any, image_ids: Container[int], category_ids: Container[int]) -> str | None:
    """What is wrong with an entry of a results file, if anything."""
    if not isinstance(entry, dict):
        return f"is not a detection: {shown(entry)}"
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        value = entry.get(key)
        if not _is_number(value) or value not in known:
            return f"{key} {shown(value)} does not exist in the ground truth"
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return f"bbox must be 4 numbers in a float's range (x, y, width, height), not {shown(box)}"
    if not _is_number(entry.get("score")):
        return f"score must be a number in a float's range, not {shown(entry.get('score'))}"
    return None


def _is_number(value: Any) -> bool:
    """Whether a value is a number other than NaN, and not an integer beyond the range of floats."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        return False


def evaluate_coco(dataset: DetectionDataset, model: nn.Module, threshold: float = 0.05) -> dict[str, float]:
    """Run a model over a data set and log COCO's twelve numbers; the original's interface.

    Args:
        dataset: any data set, with a Resizer among its transforms.
        model: a RetinaNet, which may be wrapped in DataParallel; its mode is restored.
        threshold: scores must be above it.

    Returns:
        The METRICS.
    """
    show_log()
    metrics = score(dataset, detect_dataset(model, dataset, score_threshold=threshold)).metrics
    log.info("%s", metrics_table(metrics))
    return metrics


def metrics_table(metrics: Mapping[str, float]) -> str:
    """COCO's numbers as two lines of text."""
    cells = [f"{name} {value:.3f}" for name, value in metrics.items()]
    return "  ".join(cells[:6]) + "\n" + "  ".join(cells[6:])


def class_table(classes: Sequence[ClassScore]) -> str:
    """A line of text for each class, with dashes if it has no boxes."""
    names = [shortened(row.name) for row in classes]
    width = max(5, *map(len, names))
    lines = [f"{'class':{width}}     AP   AP50     AR   boxes"]
    for name, (_, *values, boxes) in zip(names, classes, strict=True):
        cells = (f"{value:.3f}" if boxes else "-" for value in values)
        lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>5}" for cell in cells) + f"  {boxes:6d}")
    return "\n".join(lines)
