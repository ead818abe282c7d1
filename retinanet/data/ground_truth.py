"""The annotations of any data set as COCO's evaluation, and its annotation file, take them."""

import contextlib
import io
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
MAX_ID = 2**53  # whole numbers below it are floats, too


class GroundTruth(NamedTuple):
    """Annotations as columns, exactly as an evaluation takes them: float64, with those that training drops."""

    ids: np.ndarray  # [N] int, of the annotations
    image_index: np.ndarray  # [N] int: the image of each
    labels: np.ndarray  # [N] int, 0-based
    boxes_xywh: np.ndarray  # [N, 4] float64, pixels of the original image
    areas: np.ndarray  # [N] float64, which decide whether an object is small, medium or large
    is_crowd: np.ndarray  # [N] bool: boxes of many objects, which evaluation ignores

    def select(self, chosen: np.ndarray) -> "GroundTruth":
        """Those of some indices, or of a mask."""
        return GroundTruth(*(column[chosen] for column in self))


def coco_content(dataset: "DetectionDataset", file_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a COCO annotation file for any data set; difficult boxes become crowds.

    With `file_names` of the images, it is for a file: then ids that are not COCO's own count from 1 instead of 0,
    sizes are those of the image files, and boxes are rounded to thousandths of a pixel.
    """
    for_file = file_names is not None
    first_id = int(for_file and not dataset.has_coco_ids)
    names = file_names if for_file else dataset.image_files.tolist()
    images = [{"id": id_ + first_id, "file_name": name} for id_, name in zip(dataset.image_ids, names, strict=True)]
    sizes = dataset.image_sizes if for_file else dataset.declared_sizes
    if sizes.any():
        for image, (height, width) in zip(images, sizes.tolist(), strict=True):
            image |= {"height": height, "width": width}
    categories = [{"id": dataset.coco_labels[label] + first_id, "name": name} for label, name in dataset.labels.items()]
    columns = from_arrays(dataset, rounded=True) if for_file else dataset.ground_truth()
    annotations = [
        {
            "id": annotation_id,
            "image_id": images[index]["id"],
            "category_id": categories[label]["id"],
            "bbox": box,
            "area": area,
            "iscrowd": int(is_crowd),
        }
        for annotation_id, index, label, box, area, is_crowd in zip(*(c.tolist() for c in columns), strict=True)
    ]
    return {"images": images, "categories": categories, "annotations": annotations}


def from_coco(entries: list[Any]) -> GroundTruth | None:
    """COCO's annotations as columns, with ids in place of positions and labels; None if one of them is malformed."""
    try:
        ids = [np.array([entry[key] for entry in entries]) for key in ID_KEYS]
        boxes = np.array([entry["bbox"] for entry in entries])
        is_crowd = np.array([entry.get("iscrowd") or 0 for entry in entries])
        areas = np.array([_area(entry.get("area")) for entry in entries], dtype=np.float64)
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    if not entries:
        ids, boxes = [np.zeros(0, dtype=np.int64)] * 3, np.zeros((0, 4))
    for place, column in enumerate(ids):  # some tools write 1.0
        if column.dtype == np.float64 and ((column % 1 == 0) & (np.abs(column) < MAX_ID)).all():
            ids[place] = column.astype(np.int64)
    good = all(column.dtype == np.int64 and column.ndim == 1 for column in ids)
    good &= boxes.shape == (len(entries), 4) and boxes.dtype in (np.int64, np.float64)
    good &= is_crowd.dtype.kind in "bif" and is_crowd.ndim == 1 and bool(np.isin(is_crowd, (0, 1)).all())
    if not good or any(_has_bool(entries, *column) for column in zip((*ID_KEYS, "bbox"), (*ids, boxes), strict=True)):
        return None
    return GroundTruth(*ids, boxes.astype(np.float64), areas, is_crowd.astype(bool))


def _has_bool(entries: list[Any], key: str, column: np.ndarray) -> bool:
    """Whether a column has True or False, which NumPy takes for 1 and 0, among its numbers."""
    rows = np.unique(np.nonzero((column == 0) | (column == 1))[0])
    values = (entries[row][key] for row in rows)
    return any(type(number) is bool for value in values for number in (value if key == "bbox" else (value,)))


def _area(value: Any) -> float:
    """NaN where an annotation has no area, or none that can be."""
    is_number = isinstance(value, float) or (type(value) is int and abs(value) < MAX_ID)
    return float(value) if is_number else math.nan


def check_areas(path: Path, truth: GroundTruth, report: Report) -> GroundTruth:
    """The area of the box in place of a declared one that is not above 0, or larger than the box."""
    widths, heights = truth.boxes_xywh[:, 2:].T
    with np.errstate(all="ignore"):
        good = (truth.areas > 0) & (truth.areas <= (widths + 1) * (heights + 1))  # some tools count pixels
        areas = np.where(good, truth.areas, widths * heights)
    report.add_rows(
        *("declared area", np.flatnonzero(~good & ~np.isnan(truth.areas))),
        lambda row: f"{path}: annotation {truth.ids[row]}",
        lambda row: f"{truth.areas[row]:g} is no area of a box of {widths[row]:g} x {heights[row]:g}, which counts",
    )
    return truth._replace(areas=areas)


def from_arrays(dataset: "DetectionDataset", rounded: bool = False) -> GroundTruth:
    """The annotations of a data set, image by image, the difficult ones of an image after the others."""
    index = np.concatenate([dataset.image_index, dataset.difficult_image_index])
    order = np.argsort(index, kind="stable")
    rows = np.concatenate([dataset.annotations, dataset.difficult_annotations])[order].astype(np.float64)
    boxes = np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2]], axis=1)
    if rounded:  # by Python: NumPy's rounding differs from that of the decimal number in the last digit
        boxes = np.array([[round(number, 3) for number in box] for box in boxes.tolist()]).reshape(-1, 4)
    ids, labels = np.arange(1, len(rows) + 1), rows[:, 4].astype(np.int64)
    return GroundTruth(ids, index[order], labels, boxes, boxes[:, 2] * boxes[:, 3], order >= len(dataset.annotations))


def quiet_coco(content: dict[str, Any]) -> "COCO":
    """Pycocotools' COCO object from the content of an annotation file, without its messages."""
    from pycocotools.coco import COCO  # only evaluation needs it

    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
