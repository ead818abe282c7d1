"""Data sets: annotation files -> samples.

A sample is a dict: `img`, a uint8 RGB array [H, W, 3], and `annot`, a float32 array [G, 5] of
(x1, y1, x2, y2, label), pixels of that image. The boxes of all images live in one flat array, which
worker processes share instead of copying.
"""

import csv
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_jpeg

from retinanet.utils import UserError, log, progress

EXIF_ORIENTATION = 0x0112


def read_image(path: str | Path) -> np.ndarray:
    """Read a picture of any common kind as RGB, turned upright as its EXIF orientation says.

    Grey, palette, CMYK, 16-bit pictures and those with an alpha channel are converted.

    Returns:
        [H, W, 3] uint8.

    Raises:
        UserError: the file is missing, truncated, or no picture; the message names it.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
        if data[:2].tobytes() == b"\xff\xd8" and data[-2:].tobytes() == b"\xff\xd9":  # a whole JPEG: the fast way
            image = decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB, apply_exif_orientation=True)
            return image.permute(1, 2, 0).numpy()
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode -> [H, W, 3] uint8."""
    if image.mode.startswith("I"):  # 16 bits a pixel: keep the upper 8
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB")).copy()


def read_image_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture, from its header alone, turned as `read_image` turns it.

    Raises:
        UserError: the file is missing or no picture.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as a picture ({error})") from error
    return (width, height) if turned else (height, width)


class DetectionDataset(Dataset):
    """What all data sets share: pictures in files, boxes in one flat array, classes by name.

    Args:
        image_files: path of each image.
        rows: [N, 5] float32 (x1, y1, x2, y2, label), pixels of the original images, label 0-based.
        image_index: [N] int: the image of each row.
        class_names: name of each label, in order.
        transform: sample -> sample, applied last.
    """

    def __init__(
        self,
        image_files: Sequence[str],
        rows: np.ndarray,
        image_index: np.ndarray,
        class_names: Sequence[str],
        transform: Callable[[dict], dict] | None = None,
    ):
        order = np.argsort(image_index, kind="stable")
        self.image_files = np.array(image_files)
        self.rows = np.asarray(rows, dtype=np.float32).reshape(-1, 5)[order]
        self.offsets = np.concatenate([[0], np.cumsum(np.bincount(image_index, minlength=len(image_files)))])
        self.classes = {name: label for label, name in enumerate(class_names)}
        self.labels = dict(enumerate(class_names))
        self.image_ids = list(range(len(image_files)))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.image_files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {"img": self.load_image(index), "annot": self.load_annotations(index), "index": index}
        return sample if self.transform is None else self.transform(sample)

    def image_path(self, index: int) -> str:
        """Where the picture is."""
        return str(self.image_files[index])

    def load_image(self, index: int) -> np.ndarray:
        """[H, W, 3] uint8 RGB."""
        return read_image(self.image_path(index))

    def load_annotations(self, index: int) -> np.ndarray:
        """[G, 5] float32 (x1, y1, x2, y2, label), pixels of the picture; [0, 5] where there is nothing to find."""
        return self.rows[self.offsets[index] : self.offsets[index + 1]].copy()

    @cached_property
    def image_sizes(self) -> np.ndarray:
        """[num_images, 2] int: height and width of each picture, read from the files' headers, once."""
        paths = progress(range(len(self)), "reading image sizes")
        return np.array([read_image_size(self.image_path(index)) for index in paths]).reshape(-1, 2)

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


class CocoDataset(DetectionDataset):
    """A data set in COCO's layout.

    Crowd regions are left out; the categories, in the order of their ids, become the labels 0, 1, 2, ...

    Args:
        root_dir: holds `annotations/instances_<set_name>.json` and `images/<set_name>/` (or `<set_name>/`).
        set_name: such as `train2017`.
        transform: sample -> sample.

    Raises:
        UserError: the annotation file is missing or broken.
    """

    def __init__(
        self, root_dir: str | Path, set_name: str = "train2017", transform: Callable[[dict], dict] | None = None
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        self.annotation_file = self.root_dir / "annotations" / f"instances_{set_name}.json"
        content = _read_coco_json(self.annotation_file)
        folder = self.root_dir / "images" / set_name
        if not folder.is_dir() and (self.root_dir / set_name).is_dir():
            folder = self.root_dir / set_name
        images = sorted(content["images"], key=lambda image: image["id"])
        categories = sorted(content["categories"], key=lambda category: category["id"])
        position = {image["id"]: index for index, image in enumerate(images)}
        self.coco_labels = {label: category["id"] for label, category in enumerate(categories)}
        self.coco_labels_inverse = {category_id: label for label, category_id in self.coco_labels.items()}

        rows, image_index = [], []
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            if annotation.get("iscrowd") or width < 1 or height < 1:  # the original, too, skips boxes below 1 px
                continue
            try:
                label = self.coco_labels_inverse[annotation["category_id"]]
                image_index.append(position[annotation["image_id"]])
            except KeyError as error:
                raise UserError(
                    f"{self.annotation_file}: annotation {annotation.get('id')} names an image or a category that "
                    f"does not exist: {error}"
                ) from error
            rows.append((x, y, x + width, y + height, label))
        super().__init__(
            [str(folder / image["file_name"]) for image in images],
            np.array(rows, dtype=np.float32),
            np.array(image_index, dtype=np.int64),
            [category["name"] for category in categories],
            transform,
        )
        self.image_ids = [image["id"] for image in images]
        if all("width" in image and "height" in image for image in images):
            self.image_sizes = np.array([(image["height"], image["width"]) for image in images]).reshape(-1, 2)

    @cached_property
    def coco(self):
        """The annotations as pycocotools' COCO object, which evaluation needs; read from the file at first use."""
        from retinanet.coco_eval import quiet_coco

        return quiet_coco(_read_coco_json(self.annotation_file))

    def coco_label_to_label(self, category_id: int) -> int:
        """COCO's category id -> 0-based label."""
        return self.coco_labels_inverse[category_id]

    def label_to_coco_label(self, label: int) -> int:
        """0-based label -> COCO's category id."""
        return self.coco_labels[label]


def _read_coco_json(path: Path) -> dict[str, Any]:
    """The parsed annotation file, with its three lists checked to be there."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list named `{key}`, so it is not a COCO annotation file")
    return content


class CSVDataset(DetectionDataset):
    """A data set in two CSV files, as keras-retinanet and the original read them.

    Args:
        train_file: one box a line, `path,x1,y1,x2,y2,class_name`; a picture without boxes has one line
            `path,,,,,`. Relative paths start at this file's folder, or else at the working directory.
        class_list: one class a line, `class_name,id`, ids from 0.
        transform: sample -> sample.

    Raises:
        UserError: a file is missing, or a line is wrong; the message names file and line.
    """

    def __init__(self, train_file: str | Path, class_list: str | Path, transform: Callable[[dict], dict] | None = None):
        self.train_file = Path(train_file)
        class_names = _read_class_csv(Path(class_list))
        image_files, rows, image_index = _read_annotation_csv(self.train_file, class_names)
        super().__init__(image_files, rows, image_index, class_names, transform)

    def image_path(self, index: int) -> str:
        """Where the picture is: beside the CSV file, or else as the path stands."""
        path = self.train_file.parent / str(self.image_files[index])
        return str(path) if path.exists() else str(self.image_files[index])


def _read_csv(path: Path) -> list[tuple[int, list[str]]]:
    """Lines of a CSV file that are not blank, each with its number from 1."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [(number, row) for number, row in enumerate(csv.reader(file), start=1) if row]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a CSV file in UTF-8 ({error})") from error


def _read_class_csv(path: Path) -> list[str]:
    """Class names, in the order of their ids."""
    names = {}
    for number, row in _read_csv(path):
        if len(row) != 2:
            raise UserError(f"{path}:{number}: expected `class_name,id`, found {len(row)} columns")
        name, label = row[0].strip(), row[1].strip()
        if not label.isdecimal():
            raise UserError(f"{path}:{number}: the class id must be a whole number, not {label!r}")
        if name in names.values() or int(label) in names:
            raise UserError(f"{path}:{number}: class {name!r} or its id {label} stands there twice")
        names[int(label)] = name
    if sorted(names) != list(range(len(names))) or not names:
        raise UserError(f"{path}: class ids must run from 0 without gaps, found {sorted(names)}")
    return [names[label] for label in range(len(names))]


def _read_annotation_csv(path: Path, class_names: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Image files, boxes [N, 5] and the image of each box [N]."""
    labels = {name: label for label, name in enumerate(class_names)}
    positions: dict[str, int] = {}
    rows, image_index = [], []
    for number, row in _read_csv(path):
        if len(row) != 6:
            raise UserError(f"{path}:{number}: expected `path,x1,y1,x2,y2,class_name`, found {len(row)} columns")
        position = positions.setdefault(row[0], len(positions))
        if not any(row[1:]):
            continue
        try:
            x1, y1, x2, y2 = map(float, row[1:5])
        except ValueError as error:
            raise UserError(f"{path}:{number}: x1, y1, x2, y2 must be numbers ({error})") from error
        if not (x1 < x2 < np.inf and y1 < y2 < np.inf and -np.inf < x1 and -np.inf < y1):
            raise UserError(
                f"{path}:{number}: a box needs x1 < x2 and y1 < y2, found {','.join(row[1:5])} "
                "(are these x, y, width, height?)"
            )
        if row[5].strip() not in labels:
            raise UserError(f"{path}:{number}: class {row[5]!r} is not in the class list ({', '.join(labels)})")
        rows.append((x1, y1, x2, y2, labels[row[5].strip()]))
        image_index.append(position)
    if not positions:
        raise UserError(f"{path}: lists no images")
    log.debug("%s: %d images, %d boxes", path, len(positions), len(rows))
    return list(positions), np.array(rows, dtype=np.float32), np.array(image_index, dtype=np.int64)
