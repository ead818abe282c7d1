"""What all data sets share: annotation files -> samples.

A sample is a dict: `img`, a uint8 RGB array [H, W, 3], and `annot`, a float32 array [G, 5] of
(x1, y1, x2, y2, label), pixels of that image. The annotations of all images are rows of one array, which
worker processes share instead of copying.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from retinanet.data.ground_truth import GroundTruth, coco_content, from_arrays, quiet_coco
from retinanet.data.images import explain_missing, read_header, read_image
from retinanet.data.placing import find_placement, move, report_placement
from retinanet.data.report import DROPPED, MIN_SIDE, FileError, Report
from retinanet.errors import UserError, shown
from retinanet.process import log, progress

if TYPE_CHECKING:
    from pycocotools.coco import COCO

SOME_IMAGES = 5000  # an eighth of a second to read their headers; all of a usual validation set


class DetectionDataset(Dataset):
    """The base of all data sets: image files, annotations in one array, classes by name.

    Args:
        image_files: path of each image.
        annotations: [N, 5] (x1, y1, x2, y2, label), pixels of the images as annotated, label 0-based.
        image_index: [N] int: the image of each annotation.
        class_names: name of each label, in order.
        transform: sample -> sample, applied last.
        difficult: [N] bool: annotations that are neither trained on nor scored; default: none.
        annotation_ids: [N] int: the line or id of each in its file, for messages; default: 0, 1, ...
        report: what was wrong with the files; its arguments say whether that stops here; default: nothing.
        source: the annotations' file or folder, for messages; default: the class's name.
        declared_sizes: [I, 2] int: height and width of each image as annotated; 0: unknown. Boxes of images that were
            turned or resized since are moved, see `placing`.
        image_ids: of each image, for COCO's evaluation; default: 0, 1, ...

    Attributes:
        annotations, annotation_ids, image_index: as given, without the difficult ones, in the order of the images.
        offsets: [I + 1] int: the annotations of image i are those from offsets[i] to offsets[i + 1].
        difficult_annotations, difficult_image_index, difficult_offsets: likewise, of the difficult ones.
        file_sizes: [I, 2] int: height and width of the image files; 0: not read yet.

    Raises:
        DataError: the report holds errors.
    """

    # Attributes with an entry for each image.
    per_image = ("image_files", "image_ids", "declared_sizes", "file_sizes", "affine")
    in_files = True  # False where images are drawn or kept in memory
    box_format = "xyxy"  # of the annotation files
    has_coco_ids = False  # whether image_ids and coco_labels are those of a COCO file, instead of positions

    def __init__(
        self,
        image_files: Sequence[str],
        annotations: np.ndarray,
        image_index: np.ndarray,
        class_names: Sequence[str],
        transform: Callable[[dict], dict] | None = None,
        difficult: np.ndarray | None = None,
        annotation_ids: np.ndarray | None = None,
        report: Report | None = None,
        source: str | Path | None = None,
        declared_sizes: np.ndarray | None = None,
        image_ids: Sequence[int] | None = None,
    ):
        self.report = Report() if report is None else report
        annotations = np.asarray(annotations, dtype=np.float32).reshape(-1, 5)
        image_index, number = np.asarray(image_index, dtype=np.int64), len(image_files)
        difficult = np.zeros(len(annotations), dtype=bool) if difficult is None else np.asarray(difficult, dtype=bool)
        ids = np.arange(len(annotations)) if annotation_ids is None else np.asarray(annotation_ids, dtype=np.int64)
        order = np.argsort(image_index, kind="stable")
        easy, hard = order[~difficult[order]], order[difficult[order]]
        self.annotations, self.annotation_ids, self.image_index = annotations[easy], ids[easy], image_index[easy]
        self.difficult_annotations, self.difficult_image_index = annotations[hard], image_index[hard]
        self.image_files = np.array(image_files)
        self._find_offsets()
        self.declared_sizes = declared_sizes
        self.classes = {name: label for label, name in enumerate(class_names)}
        self.labels = dict(enumerate(class_names))
        self.image_ids = list(range(number) if image_ids is None else image_ids)
        self.coco_labels = {label: label for label in self.labels}
        self.transform = transform
        self.source = str(source or type(self).__name__)
        self.misfits: list[int] = []  # images whose boxes must be those of another one
        self.affine: np.ndarray | None = None  # [I, 2, 3] of `placing`, where boxes were moved
        self.file_sizes = np.zeros((number, 2), dtype=np.int64)
        if declared_sizes is not None and self.in_files:
            sizes, _ = headers = self.read_headers(self.some_images())
            differs = (sizes != declared_sizes).any(axis=1) & sizes.all(axis=1) & declared_sizes.all(axis=1)
            self.match_headers(*(self.read_headers(range(number)) if differs.any() else headers))
        if not self.report.tolerant:
            self.report.raise_errors()
        if dropped := [f"{kind} {self.report.counts[kind]:,}" for kind in self.report.kinds(DROPPED)]:
            log.info("%s: dropped: %s", self.source, ", ".join(dropped))

    def _find_offsets(self) -> None:
        ends = np.arange(len(self) + 1)
        self.offsets = np.searchsorted(self.image_index, ends)
        self.difficult_offsets = np.searchsorted(self.difficult_image_index, ends)

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.load_image(index)
        declared = None if self.declared_sizes is None or not self.in_files else self.declared_sizes[index]
        if (
            declared is not None
            and (declared != image.shape[:2]).any()
            and declared.all() > self.file_sizes[index].all()
        ):
            self.match_headers(*self.read_headers([index]))
            if index in self.misfits:
                raise UserError(str(self.report.examples["boxes of another size"][-1]))
        annotations = _clip_to_image(self.load_annotations(index), *image.shape[:2])
        sample = {"img": image, "annot": annotations, "index": index}
        return sample if self.transform is None else self.transform(sample)

    def image_path(self, index: int) -> str:
        """The image's file."""
        return str(self.image_files[index])

    def expected_path(self, index: int) -> str:
        """Where the image's file should be, whether it is there or not."""
        return self.image_path(index)

    def find_image(self, index: int) -> str | None:
        """The image's file; None where it does not exist."""
        path = self.expected_path(index)
        return path if os.path.isfile(path) else None  # noqa: PTH113, pathlib takes several times as long

    def explain_missing(self, index: int) -> str:
        """Why `find_image` finds nothing, for messages."""
        return explain_missing(self.expected_path(index))

    def load_image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 RGB."""
        return read_image(self.image_path(index))

    def load_annotations(self, index: int) -> np.ndarray:
        """[G, 5] float32 (x1, y1, x2, y2, label) as in the file; those of a sample are clipped to its image."""
        return self.annotations[self.offsets[index] : self.offsets[index + 1]].copy()

    def load_difficult(self, index: int) -> np.ndarray:
        """[D, 5] float32: boxes not trained on and ignored in evaluation: VOC's `difficult`, COCO's crowds."""
        return self.difficult_annotations[self.difficult_offsets[index] : self.difficult_offsets[index + 1]].copy()

    def known_sizes(self) -> np.ndarray:
        """[I, 2] int: height and width of each image: those of the file, or else the declared ones; 0: unknown."""
        declared = 0 if self.declared_sizes is None else self.declared_sizes
        return np.where(self.file_sizes.all(axis=1)[:, None], self.file_sizes, declared)

    @cached_property
    def image_sizes(self) -> np.ndarray:
        """[I, 2] int: height and width of each image; those that are not known yet are read from the files, once."""
        sizes = self.known_sizes()
        for index in progress(np.flatnonzero(~sizes.all(axis=1)), "reading image sizes"):
            sizes[index] = read_header(self.image_path(index))[:2]
        return sizes

    def some_images(self) -> np.ndarray:
        """The images whose headers are read where reading all would take too long."""
        return np.unique(np.linspace(0, len(self) - 1, min(len(self), SOME_IMAGES)).astype(int))

    def read_headers(self, indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
        """[I, 2] height and width as the files have them, 0 where they are not read; and [I] orientations of EXIF."""
        sizes, orientations = np.zeros((len(self), 2), dtype=np.int64), np.ones(len(self), dtype=np.int64)
        for index in progress(indices, "reading image sizes"):
            with contextlib.suppress(FileError):  # reported by whoever needs the image
                if (path := self.find_image(index)) is not None:
                    *sizes[index], orientations[index] = read_header(path)
        return sizes, orientations

    def match_headers(self, sizes: np.ndarray, orientations: np.ndarray) -> None:
        """Move the boxes of images that were turned or resized since, by what `read_headers` gives."""
        sizes = np.where(self.file_sizes.all(axis=1)[:, None], 0, sizes)  # others are settled
        declared = np.zeros_like(sizes) if self.declared_sizes is None else self.declared_sizes
        boxes = np.concatenate([self.annotations, self.difficult_annotations])[:, :4].astype(np.float64)
        index = np.concatenate([self.image_index, self.difficult_image_index])
        found = find_placement(declared, sizes, orientations, boxes, index)
        self.file_sizes += sizes
        self.__dict__.pop("image_sizes", None)
        self.misfits += np.flatnonzero(found.misfit).tolist()
        moved = found.turned | found.scaled
        if moved.any():
            boxes = move(boxes, found.affine[index])
            self.annotations[:, :4], self.difficult_annotations[:, :4] = np.split(boxes, [len(self.annotations)])
            before = found.affine if self.affine is None else self.affine
            self.affine = np.where(moved[:, None, None], found.affine, before)
        report_placement(found, declared, sizes, self.image_name, self.report)

    def ground_truth(self) -> GroundTruth:
        """All annotations, difficult ones as crowds, as COCO's evaluation takes them."""
        return from_arrays(self)

    def placed(self, truth: GroundTruth) -> GroundTruth:
        """Annotations as in the files -> with their boxes and areas moved as those of training are."""
        if self.affine is None:
            return truth
        affine, boxes = self.affine[truth.image_index], truth.boxes_xywh
        corners = move(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), affine)
        areas = truth.areas * np.abs(np.linalg.det(affine[:, :, :2]))
        return truth._replace(boxes_xywh=np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]]), areas=areas)

    def select_images(self, keep: np.ndarray) -> None:
        """Leave all other images out, with their annotations; `keep` is [I] bool."""
        new_index = np.cumsum(keep) - 1
        for name in self.per_image:
            value = getattr(self, name)
            setattr(self, name, value[keep] if isinstance(value, np.ndarray) else value and [*compress(value, keep)])
        good, hard = keep[self.image_index], keep[self.difficult_image_index]
        self.annotations, self.annotation_ids = self.annotations[good], self.annotation_ids[good]
        self.difficult_annotations = self.difficult_annotations[hard]
        self.image_index = new_index[self.image_index[good]]
        self.difficult_image_index = new_index[self.difficult_image_index[hard]]
        self._find_offsets()
        self.misfits = [int(new_index[index]) for index in self.misfits if keep[index]]
        for name in ("image_sizes", "coco"):  # cached properties
            self.__dict__.pop(name, None)

    @cached_property
    def coco(self) -> "COCO":
        """The ground truth as pycocotools' COCO object, for evaluation."""
        return quiet_coco(coco_content(self))

    def image_name(self, index: int) -> str:
        """The file and place where an image is listed, for messages."""
        return str(self.image_files[index])

    def annotation_name(self, row: int) -> str:
        """The file and place of an annotation, for messages."""
        return f"{self.image_name(self.image_index[row])}: box {self.annotation_ids[row]}"

    def image_aspect_ratio(self, index: int) -> float:
        """Width / height."""
        height, width = self.image_sizes[index]
        return float(width / height)

    def num_classes(self) -> int:
        """Number of classes, without a background class."""
        return len(self.labels)

    def label_to_name(self, label: int) -> str:
        """The name of a 0-based label."""
        return self.labels[label]

    def name_to_label(self, name: str) -> int:
        """The 0-based label of a name."""
        return self.classes[name]


def _clip_to_image(annotations: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip boxes [G, 5] to the image; those of which less than a pixel is left are dropped."""
    annotations[:, :4] = annotations[:, :4].clip(0, [width, height, width, height])
    return annotations[(annotations[:, 2:4] - annotations[:, :2] >= MIN_SIDE).all(axis=1)]


def placeholder_names(num_classes: int) -> list[str]:
    """Class names for weights that come without: `class 0`, `class 1`, ..."""
    return [f"class {label}" for label in range(num_classes)]


def class_difference(owner: str, names: Sequence[str], other: str, others: Sequence[str]) -> str:
    """The message about classes that two owners do not share; empty where they have the same in the same order."""
    texts = []
    for who, missing in (
        (owner, [name for name in others if name not in set(names)]),
        (other, [name for name in names if name not in set(others)]),
    ):
        listed = ", ".join(map(shown, missing[:5])) + (f" and {len(missing) - 5:,} more" if len(missing) > 5 else "")
        texts += [f"{who} lacks {listed}"] if missing else []
    if not texts:
        pairs = enumerate(zip(names, others, strict=True))
        texts = [f"label {n} is {shown(a)} and {shown(b)}: the order differs" for n, (a, b) in pairs if a != b][:1]
    return f"{owner} and {other} have different classes: {'; '.join(texts)}" if texts else ""


def check_classes(owner: str, class_names: list[str], dataset: DetectionDataset) -> None:
    """Make sure that a model (`owner`) and a data set have the same classes; placeholders need only be as many.

    Raises:
        UserError: they differ; the message names the classes that do.
    """
    names = list(dataset.labels.values())
    difference = class_difference(owner, class_names, dataset.source, names)
    if difference and class_names != placeholder_names(len(names)):
        raise UserError(difference)
