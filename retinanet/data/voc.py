"""Pascal VOC's layout: one XML file an image."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import list_images
from retinanet.data.reading import check_boxes, read_class_list, read_text, unknown_class
from retinanet.data.report import Report
from retinanet.errors import UserError, shown

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VOCDataset(DetectionDataset):
    """A data set in Pascal VOC's layout.

    Boxes marked `difficult` are neither trained on nor scored. VOC counts pixels from 1 and includes the last one:
    a box from 1 to 10 becomes 0 to 10.

    Args:
        root_dir: holds `Annotations`, `JPEGImages` and `ImageSets/Main/<set_name>.txt`, such as `VOCdevkit/VOC2012`.
        set_name: such as `train`.
        transform: sample -> sample.
        class_names: the classes, in order; default: those of `classes.txt` in `root_dir`, or else VOC's twenty, or
            all that `Annotations` has, sorted, if there are others among them.
        report: gets what is wrong; its arguments say what is then done.

    Raises:
        UserError: files are missing or wrong; the message lists all that is wrong.
    """

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train",
        transform: Callable[[dict], dict] | None = None,
        class_names: Sequence[str] | None = None,
        report: Report | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        list_file = self.root_dir / "ImageSets" / "Main" / f"{set_name}.txt"
        report = Report() if report is None else report
        lines = [line.strip() for line in read_text(list_file).splitlines() if line.strip()]
        if not lines:
            raise UserError(f"{list_file}: lists no images")
        folder = self.root_dir / "JPEGImages"
        images = list_images(folder, {name for line in lines for name in _readings(line)})
        image_names = [next((name for name in _readings(line) if name in images), line) for line in lines]
        report.add_rows(
            "missing image",
            [name for name in image_names if name not in images],
            lambda _: str(list_file),
            lambda name: f"image {shown(name)} does not exist in {folder}",
        )
        if class_names is None:
            class_names = read_class_list(self.root_dir / "classes.txt") or _class_names(self.root_dir / "Annotations")
        files = [self.root_dir / "Annotations" / f"{name}.xml" for name in image_names]
        found = [(index, *row) for index, path in enumerate(files) for row in _read_objects(path, class_names, report)]
        table = np.array(found, dtype=np.float64).reshape(-1, 8)
        image_index, numbers, difficult = table[:, :3].T.astype(np.int64)
        boxes, labels = table[:, 3:7], table[:, 7]
        boxes[:, :2] = np.maximum(boxes[:, :2] - 1, 0)  # some tools count from 0 nevertheless
        groups = 2 * image_index + difficult  # a difficult box is no duplicate of another

        def where(row: int) -> str:
            return f"{files[image_index[row]]}: object {numbers[row]}"

        kept = check_boxes(report, boxes, labels, groups, where)
        super().__init__(
            [str(images.get(name)) for name in image_names],
            table[kept, 3:],
            image_index[kept],
            class_names,
            transform,
            difficult[kept],
            numbers[kept],
            report,
            list_file,
        )
        self.annotation_files = files

    def annotation_name(self, row: int) -> str:
        """The annotation file and the object's number there."""
        return f"{self.annotation_files[self.image_index[row]]}: object {self.annotation_ids[row]}"


def _readings(line: str) -> tuple[str, str, str]:
    """What may be the name in a line of a list: the lists of one class have a second column, and names have spaces."""
    return line, line.rsplit(maxsplit=1)[0], line.split()[0]


def _class_names(folder: Path) -> Sequence[str]:
    """VOC's classes, or where annotations have others, all of theirs: the same for each set of a folder."""
    used = {
        entry.findtext("name", "").strip() for path in folder.rglob("*.xml") for entry in _find_objects(path, Report())
    } - {""}
    return VOC_CLASSES if used <= set(VOC_CLASSES) else sorted(used)


def _find_objects(path: Path, report: Report) -> list[ElementTree.Element]:
    """The objects of an image; none where the file cannot be read, which is reported."""
    try:
        return ElementTree.parse(path).findall("object")
    except OSError as error:
        report.add("bad entry", str(path), f"cannot be read ({error.strerror})")
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two of strange encodings
        report.add("bad entry", str(path), f"is not valid XML ({error})")
    return []


def _read_objects(path: Path, class_names: Sequence[str], report: Report) -> Iterator[tuple[float, ...]]:
    """Number from 1, `difficult`, the box as in the file, and label of each object of an image."""
    for number, entry in enumerate(_find_objects(path, report), start=1):
        where = f"{path}: object {number}"
        name = entry.findtext("name", "").strip()
        if name not in class_names:
            report.add("unknown class", where, unknown_class(name, class_names))
            continue
        try:
            box = [float(entry.findtext(f"bndbox/{key}", "")) for key in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError as error:
            report.add("not a number", where, f"needs a bndbox of four numbers ({error})")
            continue
        difficult = entry.findtext("difficult", "0").strip().lower() in ("1", "true")
        yield number, difficult, *box, class_names.index(name)
