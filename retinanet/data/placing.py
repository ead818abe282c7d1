"""Moving the boxes of images that were turned or resized after their annotation.

Annotation files declare the sizes of their images. If an image file has another size, it is the same image, turned by
its EXIF orientation, which some tools ignore, or resized after annotation; its boxes fit the declared size.
"""

import contextlib
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from retinanet.data.files import evenly
from retinanet.data.images import read_header
from retinanet.data.report import FileError
from retinanet.process import progress

if TYPE_CHECKING:
    from retinanet.data.dataset import DetectionDataset

SOME_IMAGES = 5000  # as many as a usual validation set has; reading their headers takes an eighth of a second
SLACK = 5, 0.02  # pixels, or share of the longer side, whichever is more, by which boxes may overhang their image

# For each EXIF orientation: (x, y, 1) in the image as stored -> (x, y) in the upright one, as shares of their sides.
UPRIGHT = np.array([
    [[1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]], [[-1, 0, 1], [0, 1, 0]],
    [[-1, 0, 1], [0, -1, 1]], [[1, 0, 0], [0, -1, 1]], [[0, 1, 0], [1, 0, 0]],
    [[0, -1, 1], [1, 0, 0]], [[0, -1, 1], [-1, 0, 1]], [[0, 1, 0], [-1, 0, 1]],
])  # fmt: skip

# What may be wrong with an image, and what that means for its boxes.
KINDS = {
    "turned boxes": "its boxes are turned by EXIF as the image is",
    "scaled boxes": "its boxes are scaled to the file's size",
    "boxes of another size": "its boxes fit only the declared size: do they belong to another image?",
    "declared size": "its boxes stay as they are",
    "EXIF rotation": "EXIF turns it, and its boxes must fit the upright image",
}


def overhang(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[N] pixels by which boxes [N, 4] exceed images of height and width [N, 2]; negative for boxes inside."""
    return np.maximum(-boxes[:, :2], boxes[:, 2:] - sizes[:, ::-1]).max(axis=1, initial=-np.inf)


def exceeds(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[N] bool: boxes that exceed their images by more than rounding and careless drawing can explain."""
    return overhang(boxes, sizes) > np.maximum(SLACK[0], SLACK[1] * sizes.max(axis=1))


def move(boxes: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Boxes [N, 4] as annotated -> in the image as read, by the affine [N, 2, 3] of each box's image."""
    corners = boxes.reshape(-1, 2, 2) @ affine[:, :, :2].transpose(0, 2, 1) + affine[:, None, :, 2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def find_placement(
    declared: np.ndarray, sizes: np.ndarray, orientations: np.ndarray, boxes: np.ndarray, image_index: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Find the images that were turned or resized after their annotation.

    All images of a data set that were turned (or resized) are treated alike: if the boxes of an image fit both sizes,
    the boxes of the other images decide; if those do not either, the declared size is taken to be right.

    Args:
        declared: [I, 2] height and width as annotated; 0 if unknown.
        sizes: [I, 2] height and width as read, upright; 0 if unknown.
        orientations: [I] EXIF's, from 1 to 8.
        boxes: [N, 4] xyxy, pixels of the images as annotated.
        image_index: [N] index of each box's image.

    Returns:
        [I, 2, 3] float64, affines from (x, y, 1) as annotated to (x, y) as read; and [I] bool, the images of each of
        KINDS.
    """

    def fits(limits: np.ndarray) -> np.ndarray:
        return np.bincount(image_index, exceeds(boxes, limits[image_index]), minlength=len(limits)) == 0

    def like_declared(others: np.ndarray) -> np.ndarray:  # a multiple of the declared size, give or take a pixel
        with np.errstate(all="ignore"):
            return ((others - 1) / declared).max(axis=1) <= ((others + 1) / declared).min(axis=1)

    def moved_among(images: np.ndarray) -> np.ndarray:  # if its boxes fit both sizes or none, the majority decides
        as_declared, as_file = images & only_declared, images & only_file
        return images & ~as_file & (as_declared | (as_declared.sum() >= as_file.sum()))

    fits_declared, fits_file = fits(declared), fits(sizes)
    only_declared, only_file = fits_declared & ~fits_file, fits_file & ~fits_declared
    known = declared.all(axis=1) & sizes.all(axis=1)
    differs = known & (np.abs(declared - sizes) > 1).any(axis=1)
    sideways = orientations >= 5
    as_read, as_stored = like_declared(sizes), like_declared(np.where(sideways[:, None], sizes[:, ::-1], sizes))
    turned, scaled = moved_among(differs & sideways & as_stored & ~as_read), moved_among(differs & as_read)
    # The size does not show that a square was turned, or any image by 180 degrees, or mirrored; the other images do.
    if turned.any() and not (known & sideways & ~as_stored).any():
        turned = turned | (known & (orientations > 1) & as_stored)
    misfit = differs & ~turned & ~as_read & only_declared

    moved = turned | scaled
    before, after = (np.where(moved[:, None], size[:, ::-1], 1.0) for size in (declared, sizes))  # width and height
    affine = UPRIGHT[np.where(turned, orientations, 1)] * after[:, :, None]
    affine[:, :, :2] /= before[:, None]
    other = known & (declared != sizes).any(axis=1) & ~moved & ~misfit
    unsure = sizes.all(axis=1) & (orientations > 1) & ~turned & ~(known & sideways & ~as_stored)
    return affine, dict(zip(KINDS, (turned, scaled & ~turned, misfit, other, unsure), strict=True))


def read_headers(dataset: "DetectionDataset", indices: Iterable[int]) -> tuple[np.ndarray, np.ndarray]:
    """[I, 2] height and width of the files, upright, 0 for files that are not read; and [I] their EXIF orientations."""
    sizes, orientations = np.zeros((len(dataset), 2), dtype=np.int64), np.ones(len(dataset), dtype=np.int64)
    for index in progress(indices, "reading image sizes"):
        with contextlib.suppress(FileError):  # reported when the image is needed
            if (path := dataset.find_image(index)) is not None:
                *sizes[index], orientations[index] = read_header(path)
    return sizes, orientations


def place_by_some_headers(dataset: "DetectionDataset") -> None:
    """Move boxes to fit the image files by reading some headers, or all headers if one of those differs."""
    declared = dataset.declared_sizes
    sizes, orientations = read_headers(dataset, evenly(range(len(dataset)), SOME_IMAGES))
    if ((sizes != declared) & sizes.all(axis=1, keepdims=True) & declared.all(axis=1, keepdims=True)).any():
        sizes, orientations = read_headers(dataset, range(len(dataset)))
    place_boxes(dataset, sizes, orientations)


def place_boxes(dataset: "DetectionDataset", sizes: np.ndarray, orientations: np.ndarray) -> None:
    """Move and report the boxes of images that were turned or resized after annotation, as `read_headers` shows."""
    new = sizes.all(axis=1) & ~dataset.headers_read  # the others are done
    sizes, declared = np.where(new[:, None], sizes, 0), dataset.declared_sizes
    boxes = np.concatenate([dataset.annotations, dataset.difficult_annotations])[:, :4].astype(np.float64)
    index = np.concatenate([dataset.image_index, dataset.difficult_image_index])
    affine, found = find_placement(declared, sizes, orientations, boxes, index)
    dataset.known_sizes[new], dataset.headers_read[new] = sizes[new], True
    dataset.misfit |= found["boxes of another size"]
    if (moved := found["turned boxes"] | found["scaled boxes"]).any():
        boxes = move(boxes, affine[index])
        dataset.annotations[:, :4], dataset.difficult_annotations[:, :4] = np.split(boxes, [len(dataset.annotations)])
        before = affine if dataset.affine is None else dataset.affine
        dataset.affine = np.where(moved[:, None, None], affine, before)

    def explain(image: int, text: str) -> str:
        (height, width), (file_height, file_width) = declared[image], sizes[image]
        start = f"is declared as {width} x {height}, and " if declared[image].all() else ""
        return f"{start}has {file_width} x {file_height} pixels in its file; {text}"

    for kind, text in KINDS.items():
        dataset.report.add_rows(kind, found[kind], dataset.image_name, functools.partial(explain, text=text), "")
