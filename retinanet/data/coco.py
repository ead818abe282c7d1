"""COCO's annotation file -> arrays, with a report of what is wrong.

Parsing the JSON takes nearly all the time; its entries are then read column by column, and looked at one by one
only where a column is not as it should be.
"""

import contextlib
import gc
import io
import json
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import Report, check_boxes
from retinanet.errors import UserError, shown

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MAX_JSON_BYTES = 8 * 2**30  # parsed, a file takes five times its size of memory
MAX_ID = 2**53
MAX_NAME = 1024  # characters of an image's path


class CocoBoxes(NamedTuple):
    """What an annotation file says; images and categories in the order of their ids.

    Attributes:
        image_files: [I] `file_name` of each image.
        image_ids: [I].
        image_sizes: [I, 2] int: declared height and width; None unless all images declare theirs.
        category_names: [K].
        category_ids: [K].
        rows: [N, 5] float64 (x1, y1, x2, y2, label).
        image_index: [N] int: the image of each row.
        annotation_ids: [N] int: the annotation of each row.
        is_crowd: [N] bool: rows that stand for many objects.
    """

    image_files: list[str]
    image_ids: list[int]
    image_sizes: np.ndarray | None
    category_names: list[str]
    category_ids: list[int]
    annotations: np.ndarray
    image_index: np.ndarray
    annotation_ids: np.ndarray
    is_crowd: np.ndarray


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Inside, Python does not look for garbage among millions of new objects, which takes longer than they do."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def load_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing, too large, too deep, or no JSON.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_JSON_BYTES:
            limit = f"has {size:,} bytes, more than the limit of {MAX_JSON_BYTES:,}"
            raise UserError(f"{path}: {limit if size else 'is empty'}")
        with _no_garbage_collection():
            return json.loads(path.read_bytes())
    except UserError:
        raise
    except json.JSONDecodeError as error:
        hint = "; is it two documents in one file?" if error.msg == "Extra data" else ""
        raise UserError(f"{path}:{error.lineno}: is not valid JSON ({error}){hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError, MemoryError) as error:
        reason = error or type(error).__name__
        raise UserError(f"{path}: is not valid JSON, or too deep or too large to be read ({reason})") from error


@_no_garbage_collection()
def read_coco(path: Path, report: Report) -> CocoBoxes:
    """Read images, categories and boxes.

    Args:
        path: the file.
        report: gets what is wrong; where it holds no errors, the rows are good.

    Raises:
        UserError: the file is missing, or is no COCO annotation file.
    """
    content = load_json(path)
    for name in ENTRY_CHECKS:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(f"{path}: has no list named `{name}`, so it is not a COCO annotation file")
        if name != "annotations" and not content[name]:
            raise UserError(f"{path}: its list `{name}` is empty")
    images = sorted(_good_entries(path, content["images"], "images", report), key=lambda image: image["id"])
    categories = _good_entries(path, content["categories"], "categories", report)
    categories = sorted(categories, key=lambda category: category["id"])
    image_ids, category_ids = [image["id"] for image in images], [category["id"] for category in categories]
    _report_repeated(path, "duplicate image id", image_ids, "image id", report)
    _report_repeated(path, "class list", category_ids, "category id", report)
    _report_repeated(path, "class list", [category["name"] for category in categories], "category name", report)

    columns = _annotation_columns(content["annotations"])
    if columns is None:
        columns = _annotation_columns(_good_entries(path, content["annotations"], "annotations", report))
    del content  # the parsed file is many times larger than the arrays
    ids, of_image, of_category, boxes, is_crowd = columns
    _check_ids(path, ids, report)
    image_index, known_image = _find(of_image, image_ids)
    labels, known_category = _find(of_category, category_ids)

    def where(row: int) -> str:
        return f"{path}: annotation {ids[row]}"

    def show(row: int) -> str:
        return "bbox [" + ", ".join(f"{number:.10g}" for number in bboxes[row]) + "]"

    report.add_rows(
        "unknown image", np.flatnonzero(~known_image), where, lambda row: f"there is no image with id {of_image[row]}"
    )
    report.add_rows(
        "unknown class",
        np.flatnonzero(~known_category),
        where,
        lambda row: f"there is no category with id {of_category[row]}",
    )
    _report_crowd_only(path, images, image_index[known_image], is_crowd[known_image], report)
    keep = known_image & known_category
    ids, image_index, labels, bboxes, is_crowd = (
        column[keep] for column in (ids, image_index, labels, boxes, is_crowd)
    )
    with np.errstate(all="ignore"):
        boxes = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
    groups = 2 * image_index + is_crowd  # an object is no duplicate of a crowd
    kept = check_boxes(report, boxes, labels, groups, where, "sub-pixel box", show)
    return CocoBoxes(
        [image["file_name"] for image in images],
        image_ids,
        _declared_sizes(path, images, report),
        [category["name"] for category in categories],
        category_ids,
        np.column_stack([boxes, labels])[kept],
        image_index[kept],
        ids[kept],
        is_crowd[kept],
    )


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_ID


def _is_whole(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, float) and value.is_integer())


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and "\0" not in value


def _is_bbox(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(_is_real(number) for number in value)


def _is_flag(value: Any) -> bool:
    return value is None or value in (0, 1)


def _is_real(value: Any) -> bool:
    """NaN and infinity are real here: they are reported with the boxes."""
    return isinstance(value, float) or _is_id(value)


# What an entry of each list must have, and what it must be.
ENTRY_CHECKS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "images": {"id": (_is_id, "a whole number"), "file_name": (_is_name, "a path")},
    "categories": {"id": (_is_id, "a whole number"), "name": (_is_name, "a name")},
    "annotations": {
        "id": (_is_id, "a whole number"),
        "image_id": (_is_id, "a whole number"),
        "category_id": (_is_id, "a whole number"),
        "bbox": (_is_bbox, "four numbers: x, y, width, height"),
        "iscrowd": (_is_flag, "0 or 1"),
    },
}


def _good_entries(path: Path, entries: list[Any], name: str, report: Report) -> list[dict[str, Any]]:
    """The entries that are as they should be."""
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


def _annotation_columns(entries: list[Any]) -> tuple[np.ndarray, ...] | None:
    """Ids, image ids, category ids, boxes [N, 4] and crowd flags; None where an entry is not as it should be."""
    try:
        ids = [
            np.array([entry[key] for entry in entries] or np.zeros(0, dtype=np.int64))
            for key in ("id", "image_id", "category_id")
        ]
        boxes = np.array([entry["bbox"] for entry in entries] or np.zeros((0, 4)))
        is_crowd = np.array([entry.get("iscrowd") or 0 for entry in entries] or np.zeros(0, dtype=np.int64))
    except (LookupError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    good = all(column.dtype == np.int64 and column.ndim == 1 for column in ids)
    good &= boxes.shape == (len(entries), 4) and boxes.dtype in (np.int64, np.float64)
    good &= is_crowd.dtype.kind in "bif" and bool(np.isin(is_crowd, (0, 1)).all())
    return (*ids, boxes.astype(np.float64), is_crowd.astype(bool)) if good else None


def _find(wanted: np.ndarray, known: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The place of each wanted id among the known ones, which are sorted; and whether it is there."""
    if not known:
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=bool)
    known_ids = np.array(known, dtype=np.int64)
    place = np.searchsorted(known_ids, wanted).clip(max=len(known) - 1)
    return place, known_ids[place] == wanted


def _report_repeated(path: Path, kind: str, values: list[Any], what: str, report: Report) -> None:
    seen: set[Any] = set()
    repeated = [value for value in values if value in seen or seen.add(value)]
    report.add_rows(kind, repeated, lambda value: f"{path}: {what} {shown(value)}", lambda _: "stands there twice")


def _check_ids(path: Path, ids: np.ndarray, report: Report) -> None:
    """Ids that pycocotools cannot tell apart, or takes for none."""
    values, counts = np.unique(ids, return_counts=True)
    report.add_rows(
        "annotation ids",
        values[(counts > 1) | (values == 0)],
        lambda value: f"{path}: annotation {value}",
        lambda _: "the id is 0 or stands there twice; evaluation numbers all annotations anew",
    )


def _report_crowd_only(
    path: Path, images: list[dict], image_index: np.ndarray, is_crowd: np.ndarray, report: Report
) -> None:
    crowds = np.bincount(image_index[is_crowd], minlength=len(images))
    single = np.bincount(image_index[~is_crowd], minlength=len(images))
    report.add_rows(
        "crowd-only image",
        np.flatnonzero((crowds > 0) & (single == 0)),
        lambda index: f"{path}: image {images[index]['id']}",
        lambda index: f"{shown(images[index]['file_name'])} has crowds only, and is trained on as empty",
    )


def _declared_sizes(path: Path, images: list[dict], report: Report) -> np.ndarray | None:
    """[I, 2] height and width; None unless all images declare sizes that can be."""
    sizes = [(image.get("height"), image.get("width")) for image in images]
    good = [all(_is_whole(side) and 0 < side < 2**31 for side in size) for size in sizes]
    report.add_rows(
        "declared size",
        [index for index, is_good in enumerate(good) if not is_good and sizes[index] != (None, None)],
        lambda index: f"{path}: image {images[index]['id']}",
        lambda index: f"height and width {shown(sizes[index])} cannot be; the files' own sizes count, for all images",
    )
    return np.array(sizes).astype(np.int64).reshape(-1, 2) if all(good) else None


def complete_for_evaluation(content: dict[str, Any]) -> dict[str, Any]:
    """Give pycocotools what it cannot do without: areas, crowd flags, and ids that are distinct and not 0."""
    annotations = content["annotations"]
    renumber = len({annotation["id"] for annotation in annotations} | {0}) != len(annotations) + 1
    for number, annotation in enumerate(annotations, start=1):
        area = annotation.get("area")
        if not (_is_id(area) or (isinstance(area, float) and math.isfinite(area))):
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
        if renumber:
            annotation["id"] = number
    return content


def quiet_coco(content: dict[str, Any]) -> "COCO":
    """Pycocotools' COCO object from the content of an annotation file, without its messages."""
    from pycocotools.coco import COCO  # only evaluation needs it

    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class CocoDataset(DetectionDataset):
    """A data set in COCO's layout.

    Crowd regions are difficult boxes; the categories, in the order of their ids, become the labels 0, 1, 2, ...

    Args:
        root_dir: holds `annotations/instances_<set_name>.json` and `images/<set_name>/` (or `<set_name>/`).
        set_name: such as `train2017`.
        transform: sample -> sample.

    Raises:
        UserError: the annotation file is missing or broken; the message lists all that is wrong.
    """

    def __init__(
        self, root_dir: str | Path, set_name: str = "train2017", transform: Callable[[dict], dict] | None = None
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        self.annotation_file = self.root_dir / "annotations" / f"instances_{set_name}.json"
        folder = self.root_dir / "images" / set_name
        if not folder.is_dir() and (self.root_dir / set_name).is_dir():
            folder = self.root_dir / set_name
        report = Report()
        content = read_coco(self.annotation_file, report)
        super().__init__(
            [str(folder / name) for name in content.image_files],
            content.annotations,
            content.image_index,
            content.category_names,
            transform,
            content.is_crowd,
            content.annotation_ids,
            report,
            self.annotation_file,
        )
        self.image_ids = content.image_ids
        self.coco_labels = dict(enumerate(content.category_ids))
        self.coco_labels_inverse = {category_id: label for label, category_id in self.coco_labels.items()}
        if content.image_sizes is not None:
            self.image_sizes = content.image_sizes

    def image_name(self, index: int) -> str:
        """The annotation file and the image's id."""
        return f"{self.annotation_file}: image {self.image_ids[index]}"

    def annotation_name(self, row: int) -> str:
        """The annotation file and the annotation's id."""
        return f"{self.annotation_file}: annotation {self.annotation_ids[row]}"

    @cached_property
    def coco(self):
        """The annotations as pycocotools' COCO object, which evaluation needs; read from the file at first use."""
        content = complete_for_evaluation(load_json(self.annotation_file))
        return quiet_coco(content)

    def coco_label_to_label(self, category_id: int) -> int:
        """COCO's category id -> 0-based label."""
        return self.coco_labels_inverse[category_id]

    def label_to_coco_label(self, label: int) -> int:
        """0-based label -> COCO's category id."""
        return self.coco_labels[label]
