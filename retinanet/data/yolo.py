"""YOLO's layout: one text file an image, one box a line, in fractions of the image's size."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import list_images, read_header
from retinanet.data.reading import check_boxes, read_class_list, read_text
from retinanet.data.report import FileError, Report
from retinanet.errors import UserError
from retinanet.process import progress


class YoloDataset(DetectionDataset):
    """A data set in YOLO's layout, as Darknet, Ultralytics and Roboflow write it.

    An image without a text file has no boxes. Outlines (more than four numbers) become their bounding boxes; the key
    points of poses, which `kpt_shape` in `data.yaml` announces, are ignored.

    Args:
        root_dir: holds `images/<set_name>` and `labels/<set_name>` (or `<set_name>/images` and `<set_name>/labels`),
            and the class names: `data.yaml`, or `classes.txt` with one a line.
        set_name: such as `train`.
        transform: sample -> sample.
        report: gets what is wrong; its arguments say what is then done.

    Raises:
        UserError: a file is missing, or lines are wrong; the message lists them all, with file and line.
    """

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train",
        transform: Callable[[dict], dict] | None = None,
        report: Report | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        folders = [self.root_dir / "images" / set_name, self.root_dir / set_name / "images"]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            raise UserError(f"{self.root_dir}: has neither images/{set_name} nor {set_name}/images")
        labels = self.root_dir / "labels" / set_name if folder == folders[0] else self.root_dir / set_name / "labels"
        if not labels.is_dir():
            raise UserError(f"{labels}: does not exist; it must hold the boxes")
        report = Report() if report is None else report
        class_names = _read_class_names(self.root_dir)
        images = list_images(folder)
        if not images:
            raise UserError(f"{folder}: holds no images")
        files = [labels / f"{name}.txt" for name in images]
        strangers = sorted({*labels.rglob("*.txt")} - {*files, labels / "classes.txt"})
        report.add_rows("stray file", strangers, str, lambda path: f"no image in {folder} has the name {path.stem}")
        key_numbers = _key_numbers(self.root_dir / "data.yaml")
        table, sizes = [], []
        for index, path in enumerate(progress(images.values(), "reading YOLO files")):
            try:
                sizes.append(read_header(path)[:2])
            except FileError as error:
                report.add("unreadable image", error.where, error.message)
                sizes.append((1000, 1000))  # any size will do to check the boxes
            table += [(index, *row) for row in _read_boxes(files[index], len(class_names), key_numbers, report)]
        table = np.array(table, dtype=np.float64).reshape(-1, 7)
        image_index, numbers = table[:, :2].T.astype(np.int64)
        boxes, classes = table[:, 2:6], table[:, 6]
        boxes *= np.tile(np.array(sizes)[image_index, ::-1], 2)

        def where(row: int) -> str:
            return f"{files[image_index[row]]}:{numbers[row]}"

        kept = check_boxes(report, boxes, classes, image_index, where)
        super().__init__(
            [str(path) for path in images.values()],
            table[kept, 2:],
            image_index[kept],
            class_names,
            transform,
            annotation_ids=numbers[kept],
            report=report,
            source=labels,
            declared_sizes=np.array(sizes),
        )
        self.label_files = files

    def annotation_name(self, row: int) -> str:
        """The label file and the box's line there."""
        return f"{self.label_files[self.image_index[row]]}:{self.annotation_ids[row]}"


def _read_class_names(root: Path) -> list[str]:
    """Class names from `classes.txt`, or else from `data.yaml`."""
    names = read_class_list(root / "classes.txt")
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
            f"{path}: PyYAML is needed to read it (pip install 'retinanet[yolo]'), unless "
            f"{path.parent / 'classes.txt'} lists the class names, one a line"
        ) from error
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)  # texts alone: `no` does not become False
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML ({error})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and set(names) == {str(label) for label in range(len(names))}:
        names = [names[str(label)] for label in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: needs `names`: a list, or a mapping from 0, 1, 2, ... to names")
    if len(set(names)) < len(names):
        raise UserError(f"{path}: the `names` must differ")
    return names


def _key_numbers(path: Path) -> int:
    """How many numbers of key points follow each box, according to `data.yaml`; 0 without poses."""
    text = path.read_bytes() if path.is_file() else b""
    found = re.search(rb"^kpt_shape\s*:[\s\[-]*(\d+)[\s,-]*(\d+)", text, re.MULTILINE)
    return int(found[1]) * int(found[2]) if found else 0


def _read_boxes(path: Path, num_classes: int, key_numbers: int, report: Report) -> Iterator[tuple[float, ...]]:
    """Number from 1, (x1, y1, x2, y2) in fractions of the image's size, and label of each line."""
    try:
        lines = read_text(path).splitlines() if path.is_file() else []
    except FileError as error:
        report.add("bad entry", error.where, error.message)
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            label, *numbers = map(float, line.split())
        except ValueError as error:
            report.add("not a number", where, f"expected numbers ({error})")
            continue
        values = np.array(numbers)
        if len(values) == 4 or (key_numbers and len(values) == 4 + key_numbers):
            centre, half = values[:2], values[2:4] / 2
            corners = np.concatenate([centre - half, centre + half])
        elif len(values) >= 6 and len(values) % 2 == 0 and not key_numbers:
            points = values.reshape(-1, 2)
            corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
        else:
            message = f"expected `class x y width height`, found {len(values) + 1} numbers"
            report.add("wrong column count", where, message)
            continue
        if label not in range(num_classes):
            report.add("unknown class", where, f"class {label:g} is not one of 0 to {num_classes - 1}")
        # Values slightly outside are rounded ones; values far outside are pixels instead of fractions.
        elif not ((corners > -0.5) & (corners < 1.5)).all():
            report.add("bad entry", where, "a box must be in fractions of the image's size, from 0 to 1")
        else:
            yield number, *corners, label
