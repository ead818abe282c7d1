"""What all data sets share: annotation files -> samples.

A sample is a dict: `img`, a uint8 RGB array [H, W, 3], and `annot`, a float32 array [G, 5] of
(x1, y1, x2, y2, label), pixels of that image. The annotations of all images are rows of one array, which
worker processes share instead of copying.
"""

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from retinanet.data.ground_truth import GroundTruth, coco_content, from_arrays, quiet_coco
from retinanet.data.images import read_header, read_image
from retinanet.data.report import DROPPED, MIN_SIDE, Report
from retinanet.errors import UserError, shown
from retinanet.process import log, progress

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class DetectionDataset(Dataset):
    """The base of all data sets: image files, annotations in one array, classes by name.

    Args:
        image_files: path of each image.
        annotations: [N, 5] float32 (x1, y1, x2, y2, label), pixels of the original images, label 0-based.
        image_index: [N] int: the image of each annotation.
        class_names: name of each label, in order.
        transform: sample -> sample, applied last.
        difficult: [N] bool: annotations that are neither trained on nor scored; default: none.
        annotation_ids: [N] int: the line or id of each in its file, for messages; default: 0, 1, ...
        report: what was wrong with the files; its arguments say whether that stops here; default: nothing.
        source: the annotations' file or folder, for messages; default: the class's name.
        declared_sizes: [I, 2] int: height and width of each image as the annotation files declare them; 0: unknown.

    Attributes:
        annotations, annotation_ids, image_index: as given, without the difficult ones, in the order of the images.
        offsets: [I + 1] int: the annotations of image i are those from offsets[i] to offsets[i + 1].
        difficult_annotations, difficult_image_index, difficult_offsets: likewise, of the difficult ones.
        image_ids, coco_labels: of each image and {label: category id}, for COCO's evaluation.

    Raises:
        DataError: the report holds errors.
    """

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
    ):
        self.report = Report() if report is None else report
        if not self.report.tolerant:
            self.report.raise_errors()
        annotations = np.asarray(annotations, dtype=np.float32).reshape(-1, 5)
        image_index, number = np.asarray(image_index, dtype=np.int64), len(image_files)
        difficult = np.zeros(len(annotations), dtype=bool) if difficult is None else np.asarray(difficult, dtype=bool)
        ids = np.arange(len(annotations)) if annotation_ids is None else np.asarray(annotation_ids, dtype=np.int64)
        order = np.argsort(image_index, kind="stable")
        easy, hard = order[~difficult[order]], order[difficult[order]]
        self.annotations, self.annotation_ids, self.image_index = annotations[easy], ids[easy], image_index[easy]
        self.difficult_annotations, self.difficult_image_index = annotations[hard], image_index[hard]
        self.offsets = np.searchsorted(self.image_index, np.arange(number + 1))
        self.difficult_offsets = np.searchsorted(self.difficult_image_index, np.arange(number + 1))
        self.image_files = np.array(image_files)
        self.declared_sizes = declared_sizes
        self.classes = {name: label for label, name in enumerate(class_names)}
        self.labels = dict(enumerate(class_names))
        self.image_ids = list(range(number))
        self.coco_labels = {label: label for label in self.labels}
        self.transform = transform
        self.source = str(source or type(self).__name__)
        if dropped := [f"{kind} {self.report.counts[kind]:,}" for kind in self.report.kinds(DROPPED)]:
            log.info("%s: dropped: %s", self.source, ", ".join(dropped))

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.load_image(index)
        annotations = _clip_to_image(self.load_annotations(index), *image.shape[:2])
        sample = {"img": image, "annot": annotations, "index": index}
        return sample if self.transform is None else self.transform(sample)

    def image_path(self, index: int) -> str:
        """The image's file."""
        return str(self.image_files[index])

    def find_image(self, index: int) -> str | None:
        """The image's file; None where it does not exist."""
        path = self.image_path(index)
        return path if os.path.isfile(path) else None  # noqa: PTH113, pathlib takes several times as long

    def explain_missing(self, index: int) -> str:
        """Why `find_image` finds nothing, for messages."""
        return f"image {shown(self.image_path(index))} does not exist"

    def load_image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 RGB."""
        return read_image(self.image_path(index))

    def load_annotations(self, index: int) -> np.ndarray:
        """[G, 5] float32 (x1, y1, x2, y2, label) as in the file; those of a sample are clipped to its image."""
        return self.annotations[self.offsets[index] : self.offsets[index + 1]].copy()

    def load_difficult(self, index: int) -> np.ndarray:
        """[D, 5] float32: boxes not trained on and ignored in evaluation: VOC's `difficult`, COCO's crowds."""
        return self.difficult_annotations[self.difficult_offsets[index] : self.difficult_offsets[index + 1]].copy()

    @cached_property
    def image_sizes(self) -> np.ndarray:
        """[I, 2] int: height and width of each image: the declared ones, or else read from the files' headers, once."""
        if self.declared_sizes is not None and self.declared_sizes.all():
            return self.declared_sizes
        indices = progress(range(len(self)), "reading image sizes")
        return np.array([read_header(self.image_path(index))[:2] for index in indices]).reshape(-1, 2)

    def ground_truth(self) -> GroundTruth:
        """All annotations, difficult ones as crowds, as COCO's evaluation takes them."""
        return from_arrays(self)

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


def check_classes(owner: str, class_names: list[str], dataset: DetectionDataset) -> None:
    """Make sure that a model, or a training set, and a data set have the same classes.

    Args:
        owner: of `class_names`, for the message.
        class_names: in the order of their labels; placeholders need only be as many as the data set's classes.
        dataset: that the model shall be used on.

    Raises:
        UserError: they differ; the message shows both.
    """
    names = list(dataset.labels.values())
    if names != class_names and class_names != placeholder_names(len(names)):
        raise UserError(f"{owner} has the classes {class_names}, but {dataset.source} has {names}")
