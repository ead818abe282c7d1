"""COCO's annotation file: the data set that it describes, and its content for any data set.

Parsing the JSON takes nearly all the time. Its annotations are then read as columns; each one is looked at alone
only where a column does not hold what it should.
"""

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.ground_truth import MAX_ID, GroundTruth, check_areas, from_coco
from retinanet.data.layouts import find_places, find_set, refused
from retinanet.data.placing import move
from retinanet.data.reading import MAX_NAME, load_json, no_garbage_collection
from retinanet.data.report import Report
from retinanet.errors import UserError, shown
from retinanet.process import log

# Where the annotation file of a set may lie, and its images: the first of the folders that has one of them.
ROBOFLOW = "_annotations.coco.json"
FILES = ("annotations/instances_{}.json", "annotations/{}.json", f"{{}}/{ROBOFLOW}", "{}.json")
IMAGE_FOLDERS = ("images/{}", "{}", "images", ".")
MANY_CROWDS = 0.02  # of all annotations; COCO has half as many


class CocoDataset(DetectionDataset):
    """A data set in COCO's layout, in Roboflow's, or of any file in COCO's format and a folder of images.

    Crowd regions are difficult boxes; the categories, in the order of their ids, become the labels 0, 1, 2, ...

    Args:
        root_dir: holds the annotation file in one of FILES, and the images in one of IMAGE_FOLDERS.
        set_name: such as `train2017`; or the path of the annotation file, which ends with `.json`.
        transform: sample -> sample.
        crowds_are_objects: crowd regions are objects, too.
        report: gets what is wrong.

    Raises:
        UserError: the annotation file is missing or broken; the message lists all that is wrong.
    """

    box_format = "xywh"
    annotation_format = "{}: annotation {}"
    has_coco_ids = True

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train2017",
        transform: Callable[[dict], dict] | None = None,
        crowds_are_objects: bool = False,
        report: Report | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        report = report or Report()
        self.annotation_file, name = _find_file(self.root_dir, set_name, report)
        images, categories, self._truth = read_coco(self.annotation_file, report)
        folders = [str(self.root_dir / place.format(name)) for place in IMAGE_FOLDERS]
        some = [image["file_name"] for image in images[:20]]
        places = (folder for folder in folders for file in some if os.path.isfile(f"{folder}/{file}"))  # noqa: PTH113
        self.image_folder = next(places, None) or next(filter(os.path.isdir, folders), folders[0])
        if crowds_are_objects:
            self._truth.is_crowd[:] = False
        _report_crowds(self.annotation_file, self._truth, images, report)
        boxes = self._truth.boxes_xywh
        with np.errstate(all="ignore"):
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            # Where other boxes are not fatal, evaluation must not meet them either.
            sound = np.isfinite(corners).all(axis=1) & (corners[:, 2:] >= corners[:, :2]).all(axis=1)
        super().__init__(
            [image["file_name"] for image in images],
            np.column_stack([corners, self._truth.labels]),
            self._truth.image_index,
            [category["name"] for category in categories],
            transform,
            self._truth.is_crowd,
            self._truth.ids,
            report,
            self.annotation_file,
            _declared_sizes(self.annotation_file, images, report),
            [image["id"] for image in images],
        )
        self._truth = self._truth.select(sound)
        self.coco_labels = {label: category["id"] for label, category in enumerate(categories)}
        self.coco_labels_inverse = {category_id: label for label, category_id in self.coco_labels.items()}

    def image_path(self, index: int) -> str:
        """The image's file."""
        return os.path.join(self.image_folder, str(self.image_files[index]))  # noqa: PTH118, faster than pathlib

    def image_name(self, index: int) -> str:
        """The annotation file and the image's id."""
        return f"{self.annotation_file}: image {self.image_ids[index]}"

    def box_as_written(self, row: int, box: np.ndarray) -> np.ndarray:
        """x, y, width, height."""
        return self._truth.boxes_xywh[row]

    def ground_truth(self) -> GroundTruth:
        """The annotations as the file has them, with those that training drops, moved as those of training are."""
        truth = self._truth
        if "annotation ids" in self.report.counts:
            truth = truth._replace(ids=np.arange(1, len(truth.ids) + 1))
        if self.affine is None:
            return truth
        affine, boxes = self.affine[truth.image_index], truth.boxes_xywh
        corners = move(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), affine)
        areas = truth.areas * np.abs(np.linalg.det(affine[:, :, :2]))
        return truth._replace(boxes_xywh=np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]), areas=areas)

    def select_images(self, keep: np.ndarray) -> None:
        """Leave all other images out, with their annotations; `keep` is [I] bool."""
        super().select_images(keep)
        truth = self._truth.select(keep[self._truth.image_index])
        self._truth = truth._replace(image_index=(np.cumsum(keep) - 1)[truth.image_index])

    def coco_label_to_label(self, category_id: int) -> int:
        """COCO's category id -> 0-based label."""
        return self.coco_labels_inverse[category_id]

    def label_to_coco_label(self, label: int) -> int:
        """0-based label -> COCO's category id."""
        return self.coco_labels[label]


def _find_file(root: Path, set_name: str, report: Report) -> tuple[Path, str]:
    """The annotation file of a set, and the set's name as the file has it."""
    if set_name.endswith(".json"):
        paths = [Path(set_name), root / set_name]
        return next((path for path in paths if path.is_file()), paths[0]), Path(set_name).stem
    names: dict[Path, str] = {}
    sets: dict[str, list[Path]] = {}
    for _, name, path in find_places(root, FILES):
        if names.setdefault(path, name) == name:
            sets.setdefault(name, []).append(path)
    if not sets:
        raise refused(root, " or ".join(FILES[::2]).format(*[set_name] * 2))
    path, *others = find_set(root, set_name, sets)
    report.add_rows("other source", others, str, f"is not read as the set {shown(set_name)}, but {path} is")
    return path, names[path]


@no_garbage_collection()
def read_coco(path: Path, report: Report) -> tuple[list[dict], list[dict], GroundTruth]:
    """The images and categories of a file, sorted by their ids, and its annotations."""
    content = load_json(path)
    for name in ENTRY_CHECKS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{path}: has no list named `{name}`, so it is not a COCO annotation file")
        if name != "annotations" and not content[name]:
            raise UserError(f"{path}: its list `{name}` is empty")
    good = {name: _good_entries(path, content[name], name, report) for name in ("images", "categories")}
    for entry in itertools.chain(*good.values()):
        entry["id"] = int(entry["id"])
    images, categories = (sorted(entries, key=lambda entry: entry["id"]) for entries in good.values())
    for kind, what, entries, key in (
        ("duplicate image id", "image id", images, "id"),
        ("class list", "category id", categories, "id"),
        ("class list", "category name", categories, "name"),
    ):
        ids: dict[Any, list[int]] = {}
        for entry in entries:
            ids.setdefault(entry[key], []).append(entry["id"])
        repeated = [value for value, same in ids.items() if len(same) > 1]
        report.add_rows(
            *(kind, repeated, lambda value, what=what: f"{path}: {what} {shown(value)}"),
            lambda value, ids=ids: f"is repeated: it has the ids {shown(ids[value])}",
        )
    if not (images and categories):
        report.raise_errors()
        raise UserError(f"{path}: has no image, or no category, that is as it must be")
    truth = from_coco(content["annotations"])
    if truth is None:
        truth = from_coco(_good_entries(path, content["annotations"], "annotations", report))
    # Roboflow's first category is the name of all of them together.
    if path.name == ROBOFLOW and len(categories) > 1 and categories[0]["id"] == 0 and truth.labels.all():
        log.info("%s: category %s, which has no boxes, is left out", path, shown(categories.pop(0)["name"]))
    truth = _resolve_ids(path, truth, images, categories, report)
    return images, categories, check_areas(path, truth, report)


def _is_id(value: Any) -> bool:
    """Whether a value is a whole number, which some tools write as 1.0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ID and value % 1 == 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and "\0" not in value


def _is_box(value: Any) -> bool:
    """NaN and infinity are reported with the boxes."""
    return isinstance(value, list) and len(value) == 4 and all(isinstance(x, float) or _is_id(x) for x in value)


# What an entry of each list must have, and what it must be.
_ID = (_is_id, "a whole number")
ENTRY_CHECKS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": _ID, "file_name": (_is_name, "a path")},
    "categories": {"id": _ID, "name": (_is_name, "a name")},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (_is_box, "four numbers: x, y, width, height"),
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
            *(kind, np.flatnonzero(unknown), where),
            lambda row, what=what, wanted=wanted: f"{what} {wanted[row]} does not exist",
            lambda row, wanted=wanted: int(wanted[row]),
        )
    _, first, counts = np.unique(truth.ids, return_index=True, return_counts=True)
    unusable = first[(counts > 1) | (truth.ids[first] == 0)]  # pycocotools confuses them, and takes 0 for none
    report.add_rows("annotation ids", unusable, where, "the id is 0 or repeated; evaluation renumbers all")
    return truth._replace(image_index=found[0], labels=found[1]).select(known)


def _report_crowds(path: Path, truth: GroundTruth, images: list[dict], report: Report) -> None:
    """Report images of crowds alone, and so many crowds that they must be objects."""
    crowds = int(truth.is_crowd.sum())
    if crowds > MANY_CROWDS * len(truth.ids):
        message = (
            f"{crowds:,} of {len(truth.ids):,} annotations are crowds (iscrowd 1), on which nothing is trained; "
            "CVAT and others mark masks so: --crowds_are_objects takes them as objects"
        )
        report.add("crowds", str(path), message)
    crowd_only = np.setdiff1d(truth.image_index[truth.is_crowd], truth.image_index[~truth.is_crowd])
    report.add_rows(
        *("crowd-only image", crowd_only),
        lambda index: f"{path}: image {images[index]['id']}",
        lambda index: f"{shown(images[index]['file_name'])} has crowds only, and is trained on as empty",
        "",
    )


def _declared_sizes(path: Path, images: list[dict], report: Report) -> np.ndarray:
    """[I, 2] height and width, 0 where an image declares none, or one that cannot be."""
    sizes = [(image.get("height"), image.get("width")) for image in images]
    good = [all(_is_id(side) and 0 < side < 2**31 for side in size) for size in sizes]
    bad = [index for index, is_good in enumerate(good) if not is_good and sizes[index] != (None, None)]
    report.add_rows(
        *("declared size", bad, lambda index: f"{path}: image {images[index]['id']}"),
        lambda index: f"height and width {shown(sizes[index])} are invalid; the image file's count",
    )
    return np.array([size if is_good else (0, 0) for size, is_good in zip(sizes, good, strict=True)]).astype(np.int64)
