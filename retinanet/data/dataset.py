"""What all data sets share: annotation files -> samples.

A sample is a dict with `img`, a uint8 RGB array [H, W, 3], and `annot`, a float32 array [G, 5] of
(x1, y1, x2, y2, label) in pixels of that image. The annotations of all images are rows of one array, which
worker processes share instead of copying.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from retinanet.data.files import explain_missing
from retinanet.data.ground_truth import GroundTruth, coco_content, from_arrays, quiet_coco
from retinanet.data.images import PIXEL_LIMIT, choose_pixel_range, open_image, read_header, read_image
from retinanet.data.pixels import PixelRanges, checked_range
from retinanet.data.placing import place_boxes, place_by_some_headers, read_headers
from retinanet.data.reading import check_boxes
from retinanet.data.report import DROPPED, Report
from retinanet.data.samples import SampleError, check_sample, clip_to_image, transform_name
from retinanet.errors import UserError
from retinanet.process import from_main_process, is_main_process, log, progress

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class DetectionDataset(Dataset):
    """The base of all data sets: image files, annotations in one array, classes by name.

    Args:
        image_files: path of each of the I images.
        annotations: [N, 5] (x1, y1, x2, y2, label), pixels of the images as annotated, label 0-based.
        image_index: [N] int: index of each annotation's image.
        class_names: name of each label, in order.
        transform: sample -> sample, applied last.
        difficult: [N] bool: annotations that are neither trained on nor scored; default: none.
        annotation_ids: [N] int: the line or id of each annotation in its file, for messages; default: 0, 1, ...
        report: the problems of the files so far, to which those of the boxes are added; its settings decide whether
            they raise an error. Default: the boxes are not checked.
        source: the annotations' file or folder, for messages; default: the name of the class.
        declared_sizes: [I, 2] int: height and width of each image as annotated; 0 if unknown. The boxes of images that
            were turned or resized after annotation are moved, see `placing`.
        image_ids: id of each image, for COCO's evaluation; default: 0, 1, ...
        annotation_files: annotation file of each image, for messages; default: `source`.
        written_boxes: [N, 4] the boxes as their file has them, for messages; default: as in `annotations`.

    Attributes:
        annotations, annotation_ids, image_index: as given, without the difficult ones, in the order of the images.
        offsets: [I + 1] int: the annotations of image i are rows offsets[i] to offsets[i + 1].
        difficult_annotations, difficult_image_index, difficult_offsets: the same for the difficult ones.
        known_sizes: [I, 2] int: height and width of the image files, or else the declared ones; 0 if not known yet.
        headers_read: [I] bool: whether `known_sizes` comes from the file and the boxes were moved accordingly.
        misfit: [I] bool: images whose boxes must belong to another image.
        affine: [I, 2, 3] from `placing`; None if no boxes were moved.
        pixel_range: the values that become black and white in images of more than 8 bits: two numbers, or a dict of
            them by type, see `pixels`; None: each image has its own.
        pixel_limit: millions of pixels that an image may have.

    Raises:
        UserError: files are missing or wrong; a DataError lists all problems, with file and line.
    """

    # Attributes with an entry for each image.
    per_image = (
        *("image_files", "image_ids", "annotation_files"),
        *("declared_sizes", "known_sizes", "headers_read", "misfit", "affine"),
    )
    annotation_format = "{}: box {}"  # how messages name an annotation, by its file and its id there
    image_folders: Sequence[str] = ("",)  # relative paths start at the first of these folders that has the image
    in_files = True  # False if images are drawn or kept in memory
    by_parts = False  # whether the transform takes images from `open_image`
    pixel_range: PixelRanges = None
    pixel_limit: float = PIXEL_LIMIT
    is_coco = False  # whether the ids, and the boxes as x, y, width, height, come from a COCO file

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
        annotation_files: Sequence[Path | None] | None = None,
        written_boxes: np.ndarray | None = None,
    ):
        number, size = len(image_files), len(annotations)
        self.report = report or Report()
        self.source = str(source or type(self).__name__)
        self.annotation_files = annotation_files
        self.transform = transform
        if transform is not None:
            transform_name(transform)  # raises an error if it cannot be applied to samples
        self.image_files = np.array(image_files)
        self.image_ids = list(range(number) if image_ids is None else image_ids)
        self.classes = {name: label for label, name in enumerate(class_names)}
        self.labels = dict(enumerate(class_names))
        self.coco_labels = {label: label for label in self.labels}
        self.declared_sizes = np.zeros((number, 2), dtype=np.int64) if declared_sizes is None else declared_sizes
        self.known_sizes = self.declared_sizes.copy()
        self.headers_read, self.misfit = np.zeros((2, number), dtype=bool)
        self.affine: np.ndarray | None = None

        annotations = np.asarray(annotations).reshape(-1, 5)
        self.image_index = index = np.asarray(image_index, dtype=np.int64)
        self.annotation_ids = ids = np.arange(size) if annotation_ids is None else np.asarray(annotation_ids, np.int64)
        hard = np.zeros(size, dtype=bool) if difficult is None else np.asarray(difficult, dtype=bool)
        order = np.argsort(index, kind="stable")
        # Boxes are checked in the files' order, which messages need; a difficult box is no duplicate of another one.
        if report is not None:
            kept = check_boxes(report, annotations, 2 * index + hard, self.annotation_name, written_boxes)
            order = order[kept[order]]
        easy, hard = order[~hard[order]], order[hard[order]]
        self.annotations, self.annotation_ids, self.image_index = annotations[easy].astype("f4"), ids[easy], index[easy]
        self.difficult_annotations, self.difficult_image_index = annotations[hard].astype("f4"), index[hard]
        self._find_offsets()
        if self.in_files and self.declared_sizes.any():
            place_by_some_headers(self)
        if not self.report.tolerant:
            self.report.raise_errors()
        if dropped := [f"{kind} {self.report.counts[kind]:,}" for kind in self.report.kinds(DROPPED)]:
            log.info("%s: dropped: %s", self.source, ", ".join(dropped))

    def _find_offsets(self) -> None:
        ends = np.arange(len(self) + 1)
        self.offsets = np.searchsorted(self.image_index, ends)
        self.difficult_offsets = np.searchsorted(self.difficult_image_index, ends)
        self._coco: COCO | None = None

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.open_image(index) if self.by_parts else self.load_image(index)
        size = image.shape[:2]
        self._place(index, size)
        sample = {"img": image, "annot": clip_to_image(self.load_annotations(index), *size), "index": index}
        if self.transform is None:
            return sample
        try:
            sample = check_sample(self.transform(sample), self.num_classes())
        except SampleError as error:
            raise UserError(f"{self.image_path(index)}: transform {transform_name(self.transform)}: {error}") from error
        unscaled = {"scale": 1.0, "size": size} if sample["img"].shape[:2] == size else {}
        return {**unscaled, **sample, "index": index}

    def _place(self, index: int, size: tuple[int, int]) -> None:
        """Move the boxes of an image of this height and width, if the annotations declare another size."""
        declared = self.declared_sizes[index]
        if self.in_files and not self.headers_read[index] and declared.all() and (declared != size).any():
            place_boxes(self, *read_headers(self, [index]))
            if self.misfit[index]:
                raise UserError(str(self.report.examples["boxes of another size"][-1]))

    def image_path(self, index: int) -> str:
        """The image's file; a UserError that names where it is listed if it does not exist."""
        path = self.find_image(index) if self.in_files else self.expected_path(index)
        if path is None:
            raise UserError(f"{self.image_name(index)}: {self.explain_missing(index)}")
        return path

    def expected_path(self, index: int) -> str:
        """Where the image's file should be, whether it exists or not."""
        return os.path.join(self.image_folders[0], str(self.image_files[index]))  # noqa: PTH118, faster than pathlib

    def find_image(self, index: int) -> str | None:
        """The image's file; None if it does not exist."""
        paths = (os.path.join(folder, str(self.image_files[index])) for folder in self.image_folders)  # noqa: PTH118
        return next(filter(os.path.isfile, paths), None)

    def explain_missing(self, index: int) -> str:
        """Why `find_image` finds nothing, for messages."""
        return explain_missing(self.expected_path(index))

    def load_image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 RGB."""
        return read_image(self.image_path(index), self.pixel_range, self.pixel_limit)

    def open_image(self, index: int) -> np.ndarray:
        """The array of `load_image`, or for a large image an object that gives parts of that array when sliced."""
        pixels = self.pixel_range, self.pixel_limit
        image = open_image(self.image_path(index), *pixels) if self.in_files else self.load_image(index)
        self._place(index, image.shape[:2])
        return image

    @contextlib.contextmanager
    def scaled(self, pixel_range: PixelRanges = None) -> Iterator[None]:
        """Within the context, `pixel_range` is set: the data set's own, else the given one, else one for each type.

        Under torchrun, all processes must enter the context together.
        """
        own = self.pixel_range
        given = checked_range(own) if own else pixel_range
        if self.in_files:
            files = list(filter(None, map(self.find_image, range(len(self) if is_main_process() else 0))))
            self.pixel_range = from_main_process(choose_pixel_range(files, given, self.pixel_limit))
        try:
            yield
        finally:
            self.pixel_range = own

    def load_annotations(self, index: int) -> np.ndarray:
        """[G, 5] float32 (x1, y1, x2, y2, label), not clipped to the image, as those of a sample are."""
        return self.annotations[self.offsets[index] : self.offsets[index + 1]].copy()

    def load_difficult(self, index: int) -> np.ndarray:
        """[D, 5] float32: boxes that training and evaluation ignore: VOC's `difficult`, COCO's crowds."""
        return self.difficult_annotations[self.difficult_offsets[index] : self.difficult_offsets[index + 1]].copy()

    @property
    def image_sizes(self) -> np.ndarray:
        """[I, 2] int: height and width of each image; unknown ones are read from the files, once."""
        for index in progress(np.flatnonzero(~self.known_sizes.all(axis=1)), "reading image sizes"):
            size = read_header(self.image_path(index))[:2] if self.in_files else self.load_image(index).shape[:2]
            self.known_sizes[index] = size
        return self.known_sizes

    def image_aspect_ratio(self, index: int) -> float:
        """Width / height."""
        sizes = self.known_sizes if self.known_sizes[index].all() else self.image_sizes
        height, width = sizes[index]
        return float(width / height)

    def ground_truth(self) -> GroundTruth:
        """All annotations for COCO's evaluation; difficult ones become crowds."""
        return from_arrays(self)

    @property
    def coco(self) -> "COCO":
        """The ground truth as pycocotools' COCO object, for evaluation."""
        if self._coco is None:
            self._coco = quiet_coco(coco_content(self))
        return self._coco

    def select_images(self, keep: np.ndarray) -> None:
        """Keep only some images, with their annotations; `keep` is [I] bool."""
        for name in self.per_image:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value[keep] if isinstance(value, np.ndarray) else [*compress(value, keep)])
        new_index = np.cumsum(keep) - 1
        good, hard = keep[self.image_index], keep[self.difficult_image_index]
        self.annotations, self.annotation_ids = self.annotations[good], self.annotation_ids[good]
        self.difficult_annotations = self.difficult_annotations[hard]
        self.image_index = new_index[self.image_index[good]]
        self.difficult_image_index = new_index[self.difficult_image_index[hard]]
        self._find_offsets()

    def image_name(self, index: int) -> str:
        """The file and place where an image is listed, for messages."""
        return str(self.image_files[index])

    def annotation_name(self, row: int) -> str:
        """The file and place of an annotation, for messages."""
        file = self.annotation_files[self.image_index[row]] if self.annotation_files else self.source
        return self.annotation_format.format(file, self.annotation_ids[row])

    def num_classes(self) -> int:
        """Number of classes, without a background class."""
        return len(self.labels)

    def label_to_name(self, label: int) -> str:
        """The name of a 0-based label."""
        return self.labels[label]

    def name_to_label(self, name: str) -> int:
        """The 0-based label of a name."""
        return self.classes[name]
