"""COCO's annotation file: the data set that it describes, and its content for any data set.

Parsing the JSON takes nearly all the time. Its annotations are then read as columns; each one is looked at alone
only where a column does not hold what it should.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.ground_truth import GroundTruth
from retinanet.data.reading import MAX_NAME, check_boxes, load_json, no_garbage_collection
from retinanet.data.report import Report
from retinanet.errors import UserError, shown

MAX_ID = 2**53


class CocoDataset(DetectionDataset):
    """A data set in COCO's layout.

    Crowd regions are difficult boxes; the categories, in the order of their ids, become the labels 0, 1, 2, ...

    Args:
        root_dir: holds `annotations/instances_<set_name>.json` and `images/<set_name>/` (or `<set_name>/`).
        set_name: such as `train2017`.
        transform: sample -> sample.
        report: gets what is wrong; its arguments say what is then done.

    Raises:
        UserError: the annotation file is missing or broken; the message lists all that is wrong.
    """

    box_format = "xywh"
    has_coco_ids = True

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train2017",
        transform: Callable[[dict], dict] | None = None,
        report: Report | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        self.annotation_file = self.root_dir / "annotations" / f"instances_{set_name}.json"
        self.image_folder = str(self.root_dir / "images" / set_name)
        if not Path(self.image_folder).is_dir() and (self.root_dir / set_name).is_dir():
            self.image_folder = str(self.root_dir / set_name)
        report = Report() if report is None else report
        images, categories, self._truth = read_coco(self.annotation_file, report)
        annotations, kept = _training_boxes(self.annotation_file, self._truth, report)
        truth = self._truth.select(kept)
        super().__init__(
            [image["file_name"] for image in images],
            annotations[kept],
            truth.image_index,
            [category["name"] for category in categories],
            transform,
            truth.is_crowd,
            truth.ids,
            report,
            self.annotation_file,
            _declared_sizes(self.annotation_file, images, report),
        )
        self.image_ids = [image["id"] for image in images]
        self.coco_labels = {label: category["id"] for label, category in enumerate(categories)}
        self.coco_labels_inverse = {category_id: label for label, category_id in self.coco_labels.items()}

    def image_path(self, index: int) -> str:
        """The image's file."""
        return os.path.join(self.image_folder, str(self.image_files[index]))  # noqa: PTH118, faster than pathlib

    def image_name(self, index: int) -> str:
        """The annotation file and the image's id."""
        return f"{self.annotation_file}: image {self.image_ids[index]}"

    def annotation_name(self, row: int) -> str:
        """The annotation file and the annotation's id."""
        return f"{self.annotation_file}: annotation {self.annotation_ids[row]}"

    def ground_truth(self) -> GroundTruth:
        """The annotations as the file has them, with those that training drops."""
        renumber = "annotation ids" in self.report.counts
        return self._truth._replace(ids=np.arange(1, len(self._truth.ids) + 1)) if renumber else self._truth

    def coco_label_to_label(self, category_id: int) -> int:
        """COCO's category id -> 0-based label."""
        return self.coco_labels_inverse[category_id]

    def label_to_coco_label(self, label: int) -> int:
        """0-based label -> COCO's category id."""
        return self.coco_labels[label]


@no_garbage_collection()
def read_coco(path: Path, report: Report) -> tuple[list[dict], list[dict], GroundTruth]:
    """Read the images and categories of a file, sorted by their ids, and its annotations.

    Args:
        path: the file.
        report: gets what is wrong.

    Raises:
        UserError: the file is missing, or is not a COCO annotation file.
    """
    content = load_json(path)
    for name in ENTRY_CHECKS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{path}: has no list named `{name}`, so it is not a COCO annotation file")
        if name != "annotations" and not content[name]:
            raise UserError(f"{path}: its list `{name}` is empty")
    images, categories = (
        sorted(
            ({**entry, "id": int(entry["id"])} for entry in _good_entries(path, content[name], name, report)),
            key=lambda entry: entry["id"],
        )
        for name in ("images", "categories")
    )
    for kind, what, entries, key in (
        ("duplicate image id", "image id", images, "id"),
        ("class list", "category id", categories, "id"),
        ("class list", "category name", categories, "name"),
    ):
        counts = Counter(entry[key] for entry in entries)
        places = [f"{path}: {what} {shown(value)}" for value, count in counts.items() if count > 1]
        report.add_rows(kind, places, str, lambda _: "is repeated")
    if not (images and categories):
        report.raise_errors()
    truth = _columns(content["annotations"])
    if truth is None:
        truth = _columns(_good_entries(path, content["annotations"], "annotations", report))
    truth = _resolve_ids(path, truth, images, categories, report)
    return images, categories, truth._replace(areas=_checked_areas(path, truth, report))


def _is_id(value: Any) -> bool:
    """Whether a value is a whole number, which some tools write as 1.0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ID and value % 1 == 0


def _is_real(value: Any) -> bool:
    """NaN and infinity are real here: they are reported with the boxes."""
    return isinstance(value, float) or _is_id(value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and "\0" not in value


# What an entry of each list must have, and what it must be.
_ID = (_is_id, "a whole number")
ENTRY_CHECKS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": _ID, "file_name": (_is_name, "a path")},
    "categories": {"id": _ID, "name": (_is_name, "a name")},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (
            lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_real, value)),
            "four numbers: x, y, width, height",
        ),
        "iscrowd": (lambda value: value is None or value in (0, 1), "0 or 1"),
    },
}


def _good_entries(path: Path, entries: list[Any], name: str, report: Report) -> list[dict[str, Any]]:
    """The entries that pass the checks."""
    good = []
    for number, entry in enumerate(entries):
        where = f"{path}: entry {number} of `{name}`"
        if not isinstance(entry, dict):
            report.add("bad entry", where, f"is {shown(entry)}, not an object")
            continue
        if name == "annotations" and _is_id(entry.get("id")):
            where = f"{path}: annotation {entry['id']}"
        faults = [
            f"needs {key}, {wanted}" if key not in entry else f"{key} {shown(entry[key])} is not {wanted}"
            for key, (is_good, wanted) in ENTRY_CHECKS[name].items()
            if not is_good(entry.get(key))
        ]
        if faults:
            report.add("bad entry", where, "; ".join(faults))
        else:
            good.append(entry)
    return good


def _columns(entries: list[Any]) -> GroundTruth | None:
    """Annotations as columns, with ids in place of positions and labels; None where one of them is malformed."""
    try:
        ids = [np.array([entry[key] for entry in entries]) for key in ("id", "image_id", "category_id")]
        boxes = np.array([entry["bbox"] for entry in entries])
        is_crowd = np.array([entry.get("iscrowd") or 0 for entry in entries])
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    if not entries:
        ids, boxes = [np.zeros(0, dtype=np.int64)] * 3, np.zeros((0, 4))
    ids = [_whole(column) for column in ids]
    good = all(column.dtype == np.int64 and column.ndim == 1 for column in ids)
    good &= boxes.shape == (len(entries), 4) and boxes.dtype in (np.int64, np.float64)
    good &= is_crowd.dtype.kind in "bif" and bool(np.isin(is_crowd, (0, 1)).all())
    if not good:
        return None
    return GroundTruth(*ids, boxes.astype(np.float64), _areas(entries), is_crowd.astype(bool))


def _whole(column: np.ndarray) -> np.ndarray:
    """A column of floats as integers, if all of them are whole."""
    is_whole = column.dtype == np.float64 and ((column % 1 == 0) & (np.abs(column) < MAX_ID)).all()
    return column.astype(np.int64) if is_whole else column


def _areas(entries: list[dict[str, Any]]) -> np.ndarray:
    """[N] float64; NaN where an annotation has none, or none that can be."""
    try:
        return np.fromiter((entry.get("area", math.nan) for entry in entries), np.float64, len(entries))
    except (TypeError, ValueError, OverflowError):
        areas = (entry.get("area") for entry in entries)
        return np.array([area if _is_real(area) else math.nan for area in areas], dtype=np.float64)


def _checked_areas(path: Path, truth: GroundTruth, report: Report) -> np.ndarray:
    """[N] the declared areas (of masks, say), but the box's where that is not above 0, or larger than the box."""
    widths, heights = truth.boxes_xywh[:, 2:].T
    with np.errstate(all="ignore"):
        # Some tools count pixels: a box from 0 to 9 has 10.
        good = (truth.areas > 0) & (truth.areas <= (widths + 1) * (heights + 1))
        report.add_rows(
            "declared area",
            np.flatnonzero(~good & ~np.isnan(truth.areas)),
            lambda row: f"{path}: annotation {truth.ids[row]}",
            lambda row: (
                f"area {truth.areas[row]:g} is not that of a box of {widths[row]:g} x {heights[row]:g}, which counts"
            ),
        )
        return np.where(good, truth.areas, widths * heights)


def _resolve_ids(
    path: Path, truth: GroundTruth, images: list[dict], categories: list[dict], report: Report
) -> GroundTruth:
    """Put positions and labels in place of the ids of images and categories."""

    def where(row: int) -> str:
        return f"{path}: annotation {truth.ids[row]}"

    found, known = [], np.ones(len(truth.ids), dtype=bool)
    for kind, what, wanted, entries in (
        ("unknown image", "image", truth.image_index, images),
        ("unknown class", "category", truth.labels, categories),
    ):
        ids = np.array([entry["id"] for entry in entries])
        found.append(np.searchsorted(ids, wanted).clip(max=len(ids) - 1))
        unknown = ids[found[-1]] != wanted
        known &= ~unknown
        report.add_rows(
            kind,
            np.flatnonzero(unknown),
            where,
            lambda row, what=what, wanted=wanted: f"{what} {wanted[row]} does not exist",
        )
    _, first, counts = np.unique(truth.ids, return_index=True, return_counts=True)
    unusable = first[(counts > 1) | (truth.ids[first] == 0)]  # pycocotools confuses them, and takes 0 for none
    report.add_rows("annotation ids", unusable, where, lambda _: "the id is 0 or repeated; evaluation renumbers all")
    truth = truth._replace(image_index=found[0], labels=found[1]).select(known)
    report.add_rows(
        "crowd-only image",
        np.setdiff1d(truth.image_index[truth.is_crowd], truth.image_index[~truth.is_crowd]),
        lambda index: f"{path}: image {images[index]['id']}",
        lambda index: f"{shown(images[index]['file_name'])} has crowds only, and is trained on as empty",
    )
    return truth


def _training_boxes(path: Path, truth: GroundTruth, report: Report) -> tuple[np.ndarray, np.ndarray]:
    """[N, 5] x1, y1, x2, y2, label; and [N] bool: whether training keeps each."""
    with np.errstate(all="ignore"):
        corners = np.concatenate([truth.boxes_xywh[:, :2], truth.boxes_xywh[:, :2] + truth.boxes_xywh[:, 2:]], axis=1)
    kept = check_boxes(
        report,
        corners,
        truth.labels,
        2 * truth.image_index + truth.is_crowd,  # an object is no duplicate of a crowd
        lambda row: f"{path}: annotation {truth.ids[row]}",
        lambda row: "bbox [" + ", ".join(f"{number:.10g}" for number in truth.boxes_xywh[row]) + "]",
    )
    return np.column_stack([corners, truth.labels]), kept


def _declared_sizes(path: Path, images: list[dict], report: Report) -> np.ndarray | None:
    """[I, 2] height and width; None unless all images declare sizes that can be."""
    sizes = [(image.get("height"), image.get("width")) for image in images]
    good = [all(_is_real(side) and side % 1 == 0 and 0 < side < 2**31 for side in size) for size in sizes]
    report.add_rows(
        "declared size",
        [index for index, is_good in enumerate(good) if not is_good and sizes[index] != (None, None)],
        lambda index: f"{path}: image {images[index]['id']}",
        lambda index: (
            f"height and width {shown(sizes[index])} are invalid; the sizes of the image files are used for all"
        ),
    )
    return np.array(sizes).astype(np.int64).reshape(-1, 2) if all(good) else None
