"""The annotations of any data set as COCO's evaluation, and its annotation file, take them."""

import contextlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pycocotools.coco import COCO

    from retinanet.data.dataset import DetectionDataset


class GroundTruth(NamedTuple):
    """Annotations as columns, exactly as an evaluation takes them: float64, with those that training drops.

    Attributes:
        ids: [N] int, of the annotations.
        image_index: [N] int: the image of each.
        labels: [N] int, 0-based.
        boxes_xywh: [N, 4] float64, pixels of the original image.
        areas: [N] float64, which decide whether an object is small, medium or large.
        is_crowd: [N] bool: boxes of many objects, which evaluation ignores.
    """

    ids: np.ndarray
    image_index: np.ndarray
    labels: np.ndarray
    boxes_xywh: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray

    def select(self, chosen: np.ndarray) -> "GroundTruth":
        """Those of some indices, or of a mask."""
        return GroundTruth(*(column[chosen] for column in self))


def coco_content(dataset: "DetectionDataset", file_names: Sequence[str] | None = None) -> dict[str, Any]:
    """The content of a COCO annotation file for any data set; difficult boxes become crowds.

    Args:
        dataset: gives images and classes.
        file_names: of the images, where the content is for a file: then ids that are not COCO's own count from 1
            instead of 0, sizes are those of the image files, and boxes are rounded to thousandths of a pixel.
    """
    for_file = file_names is not None
    first_id = int(for_file and not dataset.has_coco_ids)
    names = file_names if for_file else dataset.image_files.tolist()
    images = [{"id": id_ + first_id, "file_name": name} for id_, name in zip(dataset.image_ids, names, strict=True)]
    sizes = dataset.image_sizes if for_file else dataset.declared_sizes
    if sizes is not None:
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
