"""Data sets in COCO's format.

    {"images":      [{"id": 7, "file_name": "a.jpg", "height": 480, "width": 640}, ...],
     "categories":  [{"id": 3, "name": "car"}, ...],
     "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [x, y, width, height],
                      "area": 1200.0, "iscrowd": 0}, ...]}

Parsing the JSON takes nearly all the time. Annotations are then read as columns, and checked one by one only if a
column holds something unexpected.
"""

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

# Where a set's annotation file may be, and the folders of its images: the first that holds some of them is used.
ROBOFLOW = "_annotations.coco.json"
FILES = ("annotations/instances_{}.json", "annotations/{}.json", f"{{}}/{ROBOFLOW}", "{}.json")
IMAGE_FOLDERS = ("images/{}", "{}", "images", ".")
MANY_CROWDS = 0.02  # share of all annotations; COCO's is half of that


class CocoDataset(DetectionDataset):
    """A data set in COCO's or Roboflow's layout, or any file in COCO's format with a folder of images.

    Crowd regions count as difficult boxes. The categories, in the order of their ids, become the labels 0, 1, 2, ...

    Args:
        root_dir: holds the annotation file at one of FILES, and the images in one of IMAGE_FOLDERS.
        set_name: such as `train2017`; or the path of the annotation file, which ends with `.json`.
        crowds_are_objects: treat crowd regions as objects.
    """

    annotation_format = "{}: annotation {}"
    is_coco = True

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
        images, categories, truth = read_coco(self.annotation_file, report)
        folders = [str(self.root_dir / place.format(name)) for place in IMAGE_FOLDERS]
        some = [image["file_name"] for image in images[:20]]
        places = [folder for folder in folders if any(os.path.isfile(f"{folder}/{file}") for file in some)]  # noqa: PTH113
        self.image_folders = [*places, *filter(os.path.isdir, folders), folders[0]][:1]
        if crowds_are_objects:
            truth.is_crowd[:] = False
        corners = truth.corners()
        super().__init__(
            image_files=[image["file_name"] for image in images],
            annotations=np.column_stack([corners, truth.labels]),
            image_index=truth.image_index,
            class_names=[category["name"] for category in categories],
            transform=transform,
            difficult=truth.is_crowd,
            annotation_ids=truth.ids,
            report=report,
            source=self.annotation_file,
            declared_sizes=_declared_sizes(self.annotation_file, images, report),
            image_ids=[image["id"] for image in images],
            written_boxes=truth.boxes_xywh,
        )
        self._truth = truth
        self._report_crowds()
        # Boxes that are inverted or not finite, if they are not fatal, are left out of evaluation, too.
        self._truth = truth.select(np.isfinite(corners).all(axis=1) & (truth.boxes_xywh[:, 2:] >= 0).all(axis=1))
        self.coco_labels = {label: category["id"] for label, category in enumerate(categories)}
        self.coco_labels_inverse = {category_id: label for label, category_id in self.coco_labels.items()}

    def _report_crowds(self) -> None:
        """Report images that have only crowds, and data sets with so many crowds that these are probably objects."""
        index, is_crowd = self._truth.image_index, self._truth.is_crowd
        if (crowds := int(is_crowd.sum())) > MANY_CROWDS * len(is_crowd):
            message = (
                f"{crowds:,} of {len(is_crowd):,} annotations are crowds (iscrowd 1), which are not trained on; "
                "CVAT and other tools mark masks as crowds: use --crowds_are_objects to read them as objects"
            )
            self.report.add("crowds", self.source, message)
        crowd_only = np.setdiff1d(index[is_crowd], index[~is_crowd])

        def explain(image: int) -> str:
            return f"{shown(str(self.image_files[image]))} has only crowds, so training takes it as empty"

        self.report.add_rows("crowd-only image", crowd_only, self.image_name, explain, cause="")

    def image_name(self, index: int) -> str:
        """The annotation file and the image's id."""
        return f"{self.annotation_file}: image {self.image_ids[index]}"

    def ground_truth(self) -> GroundTruth:
        """The file's annotations, including those that training drops, moved as the training boxes are."""
        truth = self._truth
        if "annotation ids" in self.report.counts:
            truth = truth._replace(ids=np.arange(1, len(truth.ids) + 1))
        if self.affine is None:
            return truth
        affine = self.affine[truth.image_index]
        corners = move(truth.corners(), affine)
        areas = truth.areas * np.abs(np.linalg.det(affine[:, :, :2]))
        return truth._replace(boxes_xywh=np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]), areas=areas)

    def select_images(self, keep: np.ndarray) -> None:
        """Keep only some images, with their annotations; `keep` is [I] bool."""
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
    """The annotation file of a set, and the set's name in the path of that file."""
    if set_name.endswith(".json"):
        paths = [Path(set_name), root / set_name]
        return next((path for path in paths if path.is_file()), paths[0]), Path(set_name).stem
    names: dict[Path, str] = {}
    sets: dict[str, list[Path]] = {}
    for _, name, path in find_places(root, FILES):
        if path not in names:
            names[path] = name
            sets.setdefault(name, []).append(path)
    if not sets:
        raise refused(root, f"annotations/instances_{set_name}.json or {set_name}/{ROBOFLOW}")
    path, *others = find_set(root, set_name, sets)
    report.add_rows("other source", others, str, f"is ignored: the set {shown(set_name)} is read from {path}")
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
    images, categories = (_good_entries(path, content[name], name, report) for name in ("images", "categories"))
    for entries in (images, categories):
        entries.sort(key=lambda entry: entry["id"])
        for entry in entries:
            entry["id"] = int(entry["id"])
    for kind, what, entries, key in (
        ("duplicate image id", "image id", images, "id"),
        ("class list", "category id", categories, "id"),
        ("class list", "category name", categories, "name"),
    ):
        same_values: dict[Any, list[int]] = {}
        for entry in entries:
            same_values.setdefault(entry[key], []).append(entry["id"])
        for value, same in same_values.items():
            if len(same) > 1:
                report.add(kind, f"{path}: {what} {shown(value)}", f"is repeated: it has the ids {shown(same)}")
    if not (images and categories):
        report.raise_errors()
        raise UserError(f"{path}: has no valid image, or no valid category")
    truth = from_coco(content["annotations"])
    if truth is None:
        truth = from_coco(_good_entries(path, content["annotations"], "annotations", report))
    # Roboflow's first category is a name for all of them together.
    if path.name == ROBOFLOW and len(categories) > 1 and categories[0]["id"] == 0 and truth.labels.all():
        log.info("%s: category %s is left out, because it has no boxes", path, shown(categories.pop(0)["name"]))

    def where(row: int) -> str:
        return f"{path}: annotation {truth.ids[row]}"

    ids, first, counts = np.unique(truth.ids, return_index=True, return_counts=True)
    unusable = first[(counts > 1) | (ids == 0)]  # pycocotools mixes up repeats, and takes 0 for no match
    report.add_rows("annotation ids", unusable, where, "the id is 0 or repeated, so evaluation renumbers all")
    image_index = _find_ids("unknown image", "image", truth.image_index, images, where, report)
    labels = _find_ids("unknown class", "category", truth.labels, categories, where, report)
    found = truth._replace(image_index=image_index, labels=labels).select((image_index >= 0) & (labels >= 0))
    return images, categories, check_areas(path, found, report)


def _is_id(value: Any) -> bool:
    """Whether a value is a whole number, which some tools write as 1.0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_ID and value % 1 == 0


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and "\0" not in value


def _is_box(value: Any) -> bool:
    """Whether a value is four numbers; NaN and infinity pass, because `check_boxes` reports them."""
    return isinstance(value, list) and len(value) == 4 and all(isinstance(x, float) or _is_id(x) for x in value)


# The keys that an entry of each list needs, each with a check of its value and what the value must be.
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
        where, faults = f"{path}: entry {number} of `{name}`", [f"is {shown(entry)}, not an object"]
        if isinstance(entry, dict):
            faults = [
                f"needs {key}, {wanted}" if key not in entry else f"{key} {shown(entry[key])} is not {wanted}"
                for key, (is_good, wanted) in ENTRY_CHECKS[name].items()
                if not is_good(entry.get(key))
            ]
            if name == "annotations" and _is_id(entry.get("id")):
                where = f"{path}: annotation {entry['id']}"
        if faults:
            report.add("bad entry", where, "; ".join(faults))
        else:
            good.append(entry)
    return good


def _find_ids(
    kind: str, what: str, ids: np.ndarray, entries: list[dict], where: Callable[[int], str], report: Report
) -> np.ndarray:
    """The position of each id among entries, which are sorted by id; unknown ids are reported and get -1."""
    known = np.array([entry["id"] for entry in entries])
    found = np.searchsorted(known, ids).clip(max=len(known) - 1)
    found[known[found] != ids] = -1
    report.add_rows(kind, found < 0, where, lambda row: f"{what} {ids[row]} does not exist", lambda row: int(ids[row]))
    return found


def _declared_sizes(path: Path, images: list[dict], report: Report) -> np.ndarray:
    """[I, 2] height and width; 0 if an image declares none, or invalid ones."""
    sizes = []
    for image in images:
        size = image.get("height"), image.get("width")
        is_valid = all(_is_id(side) and 0 < side < 2**31 for side in size)
        if not is_valid and size != (None, None):
            message = f"height and width {shown(size)} are invalid, so those of the image file are used"
            report.add("declared size", f"{path}: image {image['id']}", message)
        sizes.append(size if is_valid else (0, 0))
    return np.array(sizes).astype(np.int64)
