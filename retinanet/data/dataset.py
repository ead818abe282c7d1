"""Data sets: annotation files -> samples.

A sample is a dict: `img`, a uint8 RGB array [H, W, 3], and `annot`, a float32 array [G, 5] of
(x1, y1, x2, y2, label), pixels of that image. The boxes of all images live in one flat array, which
worker processes share instead of copying.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from retinanet.data.images import read_image, read_image_size
from retinanet.data.report import DROPPED, MIN_SIDE, Report
from retinanet.errors import UserError
from retinanet.process import log, progress


class DetectionDataset(Dataset):
    """What all data sets share: pictures in files, boxes in one flat array, classes by name.

    Args:
        image_files: path of each image.
        rows: [N, 5] float32 (x1, y1, x2, y2, label), pixels of the original images, label 0-based.
        image_index: [N] int: the image of each row.
        class_names: name of each label, in order.
        transform: sample -> sample, applied last.
        difficult: [N] bool: rows that are neither trained on nor scored; default: none.
        annotation_ids: [N] int: where each one stands in its file (line, id), for messages; default: 0, 1, ...
        report: what was wrong with the files; default: nothing.
        source: the annotations' file or folder, for messages; default: the data set's kind.

    Attributes:
        rows: those that are not difficult, in the order of their images; `annotation_ids` likewise.
        report, source: as given.

    Raises:
        DataError: the report holds errors.
    """

    def __init__(
        self,
        image_files: Sequence[str],
        rows: np.ndarray,
        image_index: np.ndarray,
        class_names: Sequence[str],
        transform: Callable[[dict], dict] | None = None,
        difficult: np.ndarray | None = None,
        annotation_ids: np.ndarray | None = None,
        report: Report | None = None,
        source: str | Path | None = None,
    ):
        self.report = Report() if report is None else report
        self.report.raise_errors()
        rows, image_index = np.asarray(rows, dtype=np.float32).reshape(-1, 5), np.asarray(image_index, dtype=np.int64)
        difficult = np.zeros(len(rows), dtype=bool) if difficult is None else np.asarray(difficult, dtype=bool)
        annotation_ids = np.arange(len(rows)) if annotation_ids is None else np.asarray(annotation_ids, dtype=np.int64)
        order, self.offsets = _group_by_image(np.flatnonzero(~difficult), image_index, len(image_files))
        self.annotations, self.annotation_ids = rows[order], annotation_ids[order]
        order, self.difficult_offsets = _group_by_image(np.flatnonzero(difficult), image_index, len(image_files))
        self.difficult_annotations = rows[order]
        self.image_files = np.array(image_files)
        self.classes = {name: label for label, name in enumerate(class_names)}
        self.labels = dict(enumerate(class_names))
        self.image_ids = list(range(len(image_files)))
        self.transform = transform
        self.source = str(source or type(self).__name__)
        if dropped := [f"{kind} {self.report.counts[kind]:,}" for kind in self.report.kinds(DROPPED)]:
            log.info("%s: left out: %s", self.source, ", ".join(dropped))

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.load_image(index)
        annotations = _clip_to_picture(self.load_annotations(index), *image.shape[:2])
        sample = {"img": image, "annot": annotations, "index": index}
        return sample if self.transform is None else self.transform(sample)

    def image_path(self, index: int) -> str:
        """Where the picture is."""
        return str(self.image_files[index])

    def find_image(self, index: int) -> str | None:
        """Where the picture is; None where there is none."""
        path = str(self.image_files[index])
        return path if os.path.isfile(path) else None  # noqa: PTH113, pathlib takes several times as long

    def load_image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 RGB."""
        return read_image(self.image_path(index))

    def load_annotations(self, index: int) -> np.ndarray:
        """[G, 5] float32 (x1, y1, x2, y2, label) as they stand in the file; [0, 5] where there is nothing to find.

        A sample's are clipped to its picture; evaluation takes these.
        """
        return self.annotations[self.offsets[index] : self.offsets[index + 1]].copy()

    def load_difficult(self, index: int) -> np.ndarray:
        """[D, 5] float32: boxes left out of training and ignored in evaluation: VOC's `difficult`, COCO's crowds."""
        return self.difficult_annotations[self.difficult_offsets[index] : self.difficult_offsets[index + 1]].copy()

    @cached_property
    def image_sizes(self) -> np.ndarray:
        """[num_images, 2] int: height and width of each picture, read from the files' headers, once."""
        paths = progress(range(len(self)), "reading image sizes")
        return np.array([read_image_size(self.image_path(index)) for index in paths]).reshape(-1, 2)

    def image_name(self, index: int) -> str:
        """The file and place that tell of an image, for messages."""
        return str(self.image_files[index])

    def image_of(self, row: int) -> int:
        """The image of a row."""
        return int(np.searchsorted(self.offsets, row, side="right")) - 1

    def annotation_name(self, row: int) -> str:
        """The file and place where a box stands, for messages."""
        return f"{self.image_name(self.image_of(row))}: box {self.annotation_ids[row]}"

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


def _group_by_image(chosen: np.ndarray, image_index: np.ndarray, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """The chosen rows in the order of their images, and where each image's begin: [n] and [num_images + 1]."""
    index = image_index[chosen]
    counts = np.bincount(index, minlength=num_images)
    return chosen[np.argsort(index, kind="stable")], np.concatenate([[0], np.cumsum(counts)])


def _clip_to_picture(rows: np.ndarray, height: int, width: int) -> np.ndarray:
    """Clip boxes [G, 5] to the picture; those of which less than a pixel is left are dropped."""
    rows[:, :4] = rows[:, :4].clip(0, [width, height, width, height])
    return rows[(rows[:, 2:4] - rows[:, :2] >= MIN_SIDE).all(axis=1)]


def placeholder_names(num_classes: int) -> list[str]:
    """Class names for weights that come without: `class 0`, `class 1`, ..."""
    return [f"class {label}" for label in range(num_classes)]


def check_classes(owner: str, class_names: list[str], dataset: DetectionDataset) -> None:
    """Make sure that a model, or a training set, and a data set speak of the same classes.

    Args:
        owner: of `class_names`, for the message.
        class_names: in the order of their labels; those of a model without names need only be as many.
        dataset: that the model shall be used on.

    Raises:
        UserError: they do not; the message shows both.
    """
    names = list(dataset.labels.values())
    if names != class_names and class_names != placeholder_names(len(names)):
        raise UserError(f"{owner} knows the classes {class_names}, but {dataset.source} has {names}")
