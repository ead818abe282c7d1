"""The annotations of any data set in the forms that COCO's evaluation and annotation files need."""

import contextlib
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retinanet.data.report import Report

if TYPE_CHECKING:
    from pycocotools.coco import COCO

    from retinanet.data.dataset import DetectionDataset


ID_KEYS = ("id", "image_id", "category_id")
MAX_ID = 2**53  # a float represents every whole number below it exactly


class GroundTruth(NamedTuple):
    """Annotations as columns for evaluation: in float64, and including those that training drops."""

    ids: np.ndarray  # [N] int, of the annotations
    image_index: np.ndarray  # [N] int: index of each annotation's image
    labels: np.ndarray  # [N] int, 0-based
    boxes_xywh: np.ndarray  # [N, 4] float64, pixels of the original image
    areas: np.ndarray  # [N] float64, which decide whether an object is small, medium or large
    is_crowd: np.ndarray  # [N] bool: boxes of many objects, which evaluation ignores

    def select(self, chosen: np.ndarray) -> "GroundTruth":
        """The annotations that an array of indices or a mask chooses."""
        return GroundTruth(*(column[chosen] for column in self))

    @np.errstate(all="ignore")
    def corners(self) -> np.ndarray:
        """[N, 4] float64 (x1, y1, x2, y2)."""
        return np.hstack([self.boxes_xywh[:, :2], self.boxes_xywh[:, :2] + self.boxes_xywh[:, 2:]])


def coco_content(dataset: "DetectionDataset", file_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a COCO annotation file for any data set; difficult boxes become crowds.

    With `file_names` of the images, the content is meant for a file: ids that do not come from COCO count from 1
    instead of 0, sizes are those of the image files, and boxes are rounded to thousandths of a pixel.
    """
    if file_names is None:
        first_id, names, sizes = 0, dataset.image_files.tolist(), dataset.declared_sizes
        truth = dataset.ground_truth()
    else:
        first_id, names, sizes = 0 if dataset.is_coco else 1, file_names, dataset.image_sizes
        truth = from_arrays(dataset, rounded=True)
    image_ids = [number + first_id for number in dataset.image_ids]
    category_ids = [dataset.coco_labels[label] + first_id for label in dataset.labels]
    images = [{"id": number, "file_name": name} for number, name in zip(image_ids, names, strict=True)]
    if sizes.any():
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            image |= {"height": height, "width": width}
    categories = [{"id": category_ids[label], "name": name} for label, name in dataset.labels.items()]
    annotations = [
        {
            "id": number,
            "image_id": image_ids[index],
            "category_id": category_ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(is_crowd),
        }
        for number, index, label, box, area, is_crowd in zip(*(column.tolist() for column in truth), strict=True)
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def from_coco(entries: list[Any]) -> GroundTruth | None:
    """COCO's annotations as columns, with ids in place of image indices and labels; None if one is malformed.

    Types are compared exactly, because NumPy would take True for 1, and make a text column of a "1".
    """
    try:
        columns = [[entry[key] for entry in entries] for key in ID_KEYS]
        boxes = [entry["bbox"] for entry in entries]
        is_crowd = [entry.get("iscrowd") or 0 for entry in entries]
        areas = [_area(entry.get("area")) for entry in entries]
        numbers = list(itertools.chain.from_iterable(boxes))
        if set(map(type, itertools.chain(*columns, numbers))) - {int, float} or set(is_crowd) - {0, 1}:
            return None
        if set(map(type, boxes)) - {list} or set(map(len, boxes)) - {4}:
            return None
        boxes_xywh = np.array(numbers, dtype=np.float64).reshape(-1, 4)
    except (LookupError, TypeError, OverflowError, AttributeError):
        return None
    ids = [np.array(column) for column in columns]  # apart: together, 2**60 + 1 beside 1.0 would be rounded
    for column in ids:
        is_whole = column.dtype == np.float64 and ((column % 1 == 0) & (np.abs(column) < MAX_ID)).all()
        if column.dtype != np.int64 and not is_whole:  # some tools write 1.0
            return None
    ids = (column.astype(np.int64) for column in ids)
    return GroundTruth(*ids, boxes_xywh, np.array(areas, dtype=np.float64), np.array(is_crowd, dtype=bool))


def _area(value: Any) -> float:
    """The area that an annotation declares; NaN if it declares none, or an invalid one."""
    return value if type(value) is float or (type(value) is int and abs(value) < MAX_ID) else math.nan


@np.errstate(all="ignore")
def check_areas(path: Path, truth: GroundTruth, report: Report) -> GroundTruth:
    """Replace declared areas that are not above 0, or are larger than the box, by the area of the box."""
    areas, (widths, heights) = truth.areas, truth.boxes_xywh[:, 2:].T
    good = (areas > 0) & (areas <= (widths + 1) * (heights + 1))  # + 1: some tools count pixels
    report.add_rows(
        "declared area",
        ~good & ~np.isnan(areas),
        lambda row: f"{path}: annotation {truth.ids[row]}",
        lambda row: f"area {areas[row]:g} does not fit a box of {widths[row]:g} x {heights[row]:g}, whose area is used",
    )
    return truth._replace(areas=np.where(good, areas, widths * heights))


def from_arrays(dataset: "DetectionDataset", rounded: bool = False) -> GroundTruth:
    """The annotations of a data set, image by image; the difficult ones of an image follow the others."""
    index = np.concatenate([dataset.image_index, dataset.difficult_image_index])
    order = np.argsort(index, kind="stable")
    rows = np.concatenate([dataset.annotations, dataset.difficult_annotations])[order].astype(np.float64)
    boxes = np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2]], axis=1)
    if rounded:  # by Python, because NumPy may miss the float that is closest to the rounded decimal number
        boxes = np.array([[round(number, 3) for number in box] for box in boxes.tolist()]).reshape(-1, 4)
    ids, labels = np.arange(1, len(rows) + 1), rows[:, 4].astype(np.int64)
    return GroundTruth(ids, index[order], labels, boxes, boxes[:, 2] * boxes[:, 3], order >= len(dataset.annotations))


def quiet_coco(content: dict[str, Any]) -> "COCO":
    """Pycocotools' COCO object for the content of an annotation file, created without its messages."""
    from pycocotools.coco import COCO  # only evaluation needs it

    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
