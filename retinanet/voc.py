"""Pascal VOC's folders: one XML file a picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from retinanet.datasets import DetectionDataset
from retinanet.utils import UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def list_pictures(folder: Path) -> dict[str, Path]:
    """The pictures of a folder by their names without ending, in the order of these names."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read as a folder of pictures ({error.strerror})") from error
    return {path.stem: path for path in paths}


def read_class_list(root: Path) -> list[str] | None:
    """The class names of `root`/classes.txt, one a line; None where there is no such file."""
    path = root / "classes.txt"
    if not path.is_file():
        return None
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path}: needs one class name a line, each once")
    return names


class VOCDataset(DetectionDataset):
    """A data set in Pascal VOC's layout.

    Boxes marked `difficult` are neither trained on nor scored. VOC counts pixels from 1 and includes the last one:
    a box from 1 to 10 becomes 0 to 10.

    Args:
        root_dir: holds `Annotations`, `JPEGImages` and `ImageSets/Main/<set_name>.txt`, such as `VOCdevkit/VOC2012`.
        set_name: such as `train`.
        transform: sample -> sample.
        class_names: the classes, in order; by default those of `classes.txt` in `root_dir`, else VOC's twenty, or if
            there are others, all that stand in `Annotations`, sorted.

    Raises:
        UserError: a file is missing or wrong; the message names it.
    """

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train",
        transform: Callable[[dict], dict] | None = None,
        class_names: Sequence[str] | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        list_file = self.root_dir / "ImageSets" / "Main" / f"{set_name}.txt"
        try:  # the lists of one class have a second column: whether it is in the picture
            image_names = [line.split()[0] for line in list_file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise UserError(f"{list_file}: cannot be read ({error.strerror})") from error
        if not image_names:
            raise UserError(f"{list_file}: lists no images")
        pictures = list_pictures(self.root_dir / "JPEGImages")
        missing = [name for name in image_names if name not in pictures]
        if missing:
            raise UserError(f"{list_file}: there is no picture {missing[0]!r} in {self.root_dir / 'JPEGImages'}")

        files = [self.root_dir / "Annotations" / f"{name}.xml" for name in image_names]
        objects = [_read_objects(path) for path in files]  # of each picture
        if class_names is None:
            class_names = read_class_list(self.root_dir) or _class_names(self.root_dir / "Annotations", objects)
        labels = {name: label for label, name in enumerate(class_names)}
        rows, image_index, difficult = [], [], []
        for index, (path, found) in enumerate(zip(files, objects, strict=True)):
            for name, box, is_difficult in found:
                if name not in labels:
                    raise UserError(f"{path}: class {name!r} is none of {', '.join(labels)}")
                rows.append((*box, labels[name]))
                image_index.append(index)
                difficult.append(is_difficult)
        super().__init__(
            [str(pictures[name]) for name in image_names],
            np.array(rows, dtype=np.float32),
            np.array(image_index, dtype=np.int64),
            class_names,
            transform,
            np.array(difficult, dtype=bool),
        )


def _class_names(folder: Path, objects: Sequence[Sequence[tuple[str, Any, bool]]]) -> Sequence[str]:
    """VOC's classes if there are no others, else those of all annotations: the same for each set of a folder."""
    used = {name for found in objects for name, _, _ in found}
    if used <= set(VOC_CLASSES):
        return VOC_CLASSES
    return sorted({name for path in folder.glob("*.xml") for name, _, _ in _read_objects(path)})


def _read_objects(path: Path) -> list[tuple[str, tuple[float, float, float, float], bool]]:
    """Class name, box (x1, y1, x2, y2, pixels from 0) and `difficult` of each object of a picture."""
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: is not valid XML ({error})") from error
    objects = []
    for number, entry in enumerate(root.findall("object"), start=1):
        try:
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError as error:
            raise UserError(f"{path}: object {number} needs a bndbox of four numbers ({error})") from error
        name = entry.findtext("name", "").strip()
        x1, y1 = max(0.0, x1 - 1), max(0.0, y1 - 1)  # some tools count from 0 all the same
        if not name or not (x1 < x2 < np.inf and y1 < y2 < np.inf):
            raise UserError(f"{path}: object {number} needs a name, xmin <= xmax and ymin <= ymax")
        objects.append((name, (x1, y1, x2, y2), entry.findtext("difficult", "0").strip() == "1"))
    return objects
