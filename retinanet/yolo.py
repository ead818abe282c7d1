"""YOLO's folders: one text file a picture, one box a line, in fractions of the picture's size."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from retinanet.datasets import DetectionDataset, read_image_size
from retinanet.utils import UserError, progress
from retinanet.voc import list_pictures, read_class_list


class YoloDataset(DetectionDataset):
    """A data set in YOLO's layout, as Darknet, Ultralytics and Roboflow write it.

    A picture without a text file has no boxes. Of an outline (more than four numbers) its bounding box is taken.

    Args:
        root_dir: holds `images/<set_name>` and `labels/<set_name>` (or `<set_name>/images` and `<set_name>/labels`),
            and the class names: `data.yaml`, or `classes.txt` with one a line.
        set_name: such as `train`.
        transform: sample -> sample.

    Raises:
        UserError: a file is missing, or a line is wrong; the message names file and line.
    """

    def __init__(self, root_dir: str | Path, set_name: str = "train", transform: Callable[[dict], dict] | None = None):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        folders = [self.root_dir / "images" / set_name, self.root_dir / set_name / "images"]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise UserError(f"{self.root_dir}: has neither images/{set_name} nor {set_name}/images")
        labels = self.root_dir / "labels" / set_name if folder == folders[0] else self.root_dir / set_name / "labels"
        class_names = _read_class_names(self.root_dir)
        pictures = list_pictures(folder)
        if not pictures:
            raise UserError(f"{folder}: holds no pictures")
        rows, image_index, sizes = [], [], []
        for index, (name, path) in enumerate(progress(pictures.items(), "reading YOLO files")):
            sizes.append(read_image_size(path))
            boxes = _read_boxes(labels / f"{name}.txt", *sizes[-1], len(class_names))
            rows += boxes
            image_index += [index] * len(boxes)
        super().__init__(
            [str(path) for path in pictures.values()],
            np.array(rows, dtype=np.float32),
            np.array(image_index, dtype=np.int64),
            class_names,
            transform,
        )
        self.image_sizes = np.array(sizes)


def _read_class_names(root: Path) -> list[str]:
    """Class names from `classes.txt`, or else from `data.yaml`."""
    names = read_class_list(root)
    if names is not None:
        return names
    if not (root / "data.yaml").is_file():
        raise UserError(f"{root}: has neither classes.txt nor data.yaml, which name the classes")
    return _read_yaml_names(root / "data.yaml")


def _read_yaml_names(path: Path) -> list[str]:
    try:
        import yaml  # an extra: nothing else needs it
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path}: PyYAML is needed to read it (pip install 'retinanet[yolo]'), unless the class names stand in "
            f"{path.parent / 'classes.txt'}, one a line"
        ) from error
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML ({error})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[label] for label in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path}: needs `names`: a list, or a mapping from 0, 1, 2, ... to names")
    return [str(name) for name in names]


def _read_boxes(path: Path, height: int, width: int, num_classes: int) -> list[tuple[float, ...]]:
    """(x1, y1, x2, y2, label) of each line, pixels."""
    if not path.is_file():
        return []
    boxes = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            label, *numbers = map(float, line.split())
        except ValueError as error:
            raise UserError(f"{path}:{number}: expected numbers ({error})") from error
        values = np.array(numbers)
        if len(values) == 4:
            centre, half = values[:2], values[2:] / 2
            corners = np.concatenate([centre - half, centre + half])
        elif len(values) >= 6 and len(values) % 2 == 0:
            points = values.reshape(-1, 2)
            corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
        else:
            raise UserError(f"{path}:{number}: expected `class x y width height`, found {len(values) + 1} numbers")
        if label not in range(num_classes):
            raise UserError(f"{path}:{number}: class {label:g} is not one of 0 to {num_classes - 1}")
        # A little over the edge is rounding; far over it are pixels where fractions should be.
        if not (np.isfinite(corners).all() and (corners > -0.5).all() and (corners < 1.5).all()):
            raise UserError(f"{path}:{number}: a box must be in fractions of the picture's size, from 0 to 1")
        x1, y1, x2, y2 = corners.clip(0, 1) * (width, height, width, height)
        if x2 <= x1 or y2 <= y1:
            raise UserError(f"{path}:{number}: the box is empty")
        boxes.append((x1, y1, x2, y2, label))
    return boxes
