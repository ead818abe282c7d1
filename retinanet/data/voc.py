"""Pascal VOC's layout and its kin: one XML file an image."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from retinanet.data.classes import read_class_list, unknown_class
from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import IMAGE_SUFFIXES, list_images, walk
from retinanet.data.layouts import choose_share, find_set, refused, report_list
from retinanet.data.reading import parse_number, parse_side, read_bytes, read_text
from retinanet.data.report import FileError, Report
from retinanet.errors import UserError, shown

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# Where lists of sets, XML files and images lie, in upper or lower case; or else all of them beside each other.
LISTS = ("ImageSets/Main", "ImageSets")
XML = {".xml"}
XML_FOLDERS = ("annotations", "annotation", "xmls", "xml", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")


class VOCDataset(DetectionDataset):
    """A data set in Pascal VOC's layout, or one of its kin.

    Boxes marked `difficult` are neither trained on nor scored. VOC counts pixels from 1 and includes the last one:
    a box from 1 to 10 becomes 0 to 10.

    Args:
        root_dir: holds `Annotations`, `JPEGImages` and `ImageSets/Main/<set_name>.txt`, such as `VOCdevkit/VOC2012`;
            or, without lists, the images and XML files of each set in a folder `<set_name>`, or those of all sets.
        set_name: such as `train`.
        transform: sample -> sample.
        class_names: the classes, in order; default: those of `classes.txt` in `root_dir`, or else VOC's twenty, or
            all that the XML files have, sorted, if there are others among them.
        val_share: of the images that are for validation, in a folder without sets.
        report: gets what is wrong.

    Raises:
        UserError: files are missing or wrong; the message lists all that is wrong.
    """

    annotation_format = "{}: object {}"

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train",
        transform: Callable[[dict], dict] | None = None,
        class_names: Sequence[str] | None = None,
        val_share: float | None = None,
        report: Report | None = None,
    ):
        self.root_dir = Path(root_dir)
        self.set_name = set_name
        report = report or Report()
        list_file, base = _find_set(self.root_dir, set_name, val_share)
        folder = _subfolder(base, XML_FOLDERS)
        xml_files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk(folder, XML)}
        read = functools.cache(_read_xml)
        if class_names is None:
            class_names = read_class_list(self.root_dir / "classes.txt")
        if class_names is None:  # those of all sets, so that these agree
            all_files = {*xml_files.values(), *(() if base == self.root_dir else walk(self.root_dir, XML))}
            used = {name for path in all_files for name, *_ in read(path).objects} - {""}
            class_names = VOC_CLASSES if used <= set(VOC_CLASSES) else sorted(used)
        pairs = _pair_files(list_file, folder, xml_files, _subfolder(base, IMAGE_FOLDERS), read, report)
        if not list_file and base == self.root_dir:  # there are no sets
            names = {image.relative_to(base).as_posix(): image for image in pairs}
            pairs = {names[name]: pairs[names[name]] for name in choose_share(base, set_name, val_share, names)}
        faults = {path: read(path).fault for path in pairs.values() if path and read(path).fault}
        for path, fault in faults.items():
            report.add("bad entry", str(path), fault)
        pairs = {image: path for image, path in pairs.items() if path not in faults}
        contents = [read(path) if path else _Content() for path in pairs.values()]
        sizes = np.array([content.size for content in contents], dtype=np.int64).reshape(-1, 2)
        bad = [path for path, size in zip(pairs.values(), sizes, strict=True) if (size < 0).any()]
        report.add_rows("declared size", bad, str, "height or width is not a whole number; the image file's counts", "")
        rows = [
            (index, *row)
            for index, (path, content) in enumerate(zip(pairs.values(), contents, strict=True))
            for row in _read_objects(path, content, class_names, report)
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 8)
        image_index, numbers, difficult = table[:, :3].T.astype(np.int64)
        table[:, 3:5] = np.maximum(table[:, 3:5] - 1, 0)  # some tools count from 0 nevertheless
        super().__init__(
            [str(image) for image in pairs],
            table[:, 3:],
            image_index,
            class_names,
            transform,
            difficult,
            numbers,
            report,
            list_file or folder,
            np.where((sizes > 0).all(axis=1, keepdims=True), sizes, 0),
            annotation_files=[*pairs.values()],
        )


def _find_set(root: Path, set_name: str, val_share: float | None) -> tuple[Path | None, Path]:
    """The list of a set, if there are lists, and the folder that holds its files."""
    sets = {path.stem: (path, root) for place in LISTS for path in sorted(root.glob(f"{place}/*.txt"))}
    if not root.is_dir():
        raise refused(root, "")
    if not sets and _subfolder(root, XML_FOLDERS) == root and not any(root.glob("*.xml")):
        sets = {path.name: (None, path) for path in root.iterdir() if path.is_dir() and any(walk(path, XML))}
        if not sets:
            raise refused(root, f"ImageSets/Main/{set_name}.txt, and no XML files")
    return find_set(root, set_name, sets, val_share) if sets else (None, root)


def _subfolder(base: Path, names: Sequence[str]) -> Path:
    """The first of some folders that exists, in upper or lower case; or else the base."""
    folders = {path.name.lower(): path for path in base.iterdir() if path.is_dir()}
    return next((folders[name] for name in names if name in folders), base)


def _read_list(path: Path) -> list[tuple[str, list[str]]]:
    """The lines of a list, and what may be the image's name in each.

    The lists of one class have a second column, names have spaces, and some tools list files, or their paths.
    """
    lines = []
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        names = [line, line.rsplit(maxsplit=1)[0], line.split()[0]]
        names += [name.rpartition(".")[0] for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        lines.append((line, [*names, Path(names[-1]).name]))
    if not lines:
        raise UserError(f"{path}: lists no images")
    return lines


def _pair_files(
    list_file: Path | None,
    folder: Path,
    xml_files: Mapping[str, Path],
    image_folder: Path,
    read: Callable[[Path], "_Content"],
    report: Report,
) -> dict[Path, Path | None]:
    """Each image of a list, or of all XML files, and its XML file: of the same name, or naming it as its own."""
    lines = _read_list(list_file) if list_file else [(name, [name]) for name in xml_files]
    files = [next((xml_files[name] for name in names if name in xml_files), None) for _, names in lines]
    named = {path: read(path).file_name for path in files if path}
    wanted = {name for _, names in lines for name in names}
    images = list_images(image_folder, wanted, set(named.values()))
    found = []
    for (_, names), path in zip(lines, files, strict=True):
        also = [Path(named[path]).stem] if path else []
        found.append(next((images[name] for name in [*names, *also] if name in images), None))
    report_list(list_file or folder, image_folder, [line for line, _ in lines], found, report)
    pairs = {image: path for image, path in zip(found, files, strict=True) if image}
    without = [image for image, path in pairs.items() if path is None]
    if not list_file:
        message = "has no XML file, and is left out; without objects, it needs one without <object>"
        report.add_rows("stray file", sorted(set(images.values()) - set(pairs)), str, message, message)
    elif len(without) > len(pairs) / 2:
        message = (
            f"{len(without):,} of the {len(pairs):,} images that are listed have no XML file, such as "
            f"{without[0].name}; an image without objects needs one without <object>"
        )
        report.add("bad entry", str(folder), message, "no XML", len(without))
    else:
        message = "has no XML file, and counts as an image without objects"
        report.add_rows("no annotations", without, str, message, "no XML")
    return pairs


class _Content(NamedTuple):
    """What an XML file says: the image's name, its height and width (of `parse_side`), objects, or a fault."""

    file_name: str = ""
    size: tuple[int, int] = (0, 0)
    objects: Sequence[tuple[str, bool, list[str]]] = ()  # class, `difficult`, xmin, ymin, xmax, ymax
    fault: str = ""


def _read_xml(path: Path) -> _Content:
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except FileError as error:
        return _Content(fault=error.message)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two of strange encodings
        return _Content(fault=f"is not valid XML ({error})")
    for entry in root.iter():  # without the namespace, in lower case
        entry.tag = entry.tag.rpartition("}")[2].lower()
    if root.tag != "annotation":
        return _Content(fault=f"is not a VOC annotation: its root is {shown(root.tag)}, not 'annotation'")
    objects = [
        (
            entry.findtext("name", "").strip(),
            entry.findtext("difficult", "0").strip().lower() in ("1", "true"),
            [entry.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")],
        )
        for entry in root.findall("object")
    ]
    size = tuple(parse_side(root.findtext(f"size/{side}", "")) for side in ("height", "width"))
    file_name = PureWindowsPath(root.findtext("filename", "").strip()).name  # whose paths may have either slash
    return _Content(file_name, size, objects)


def _read_objects(
    path: Path, content: _Content, class_names: Sequence[str], report: Report
) -> Iterator[tuple[float, ...]]:
    """Number from 1, `difficult`, the box as in the file, and label of each object of an image."""
    for number, (name, difficult, texts) in enumerate(content.objects, start=1):
        where = f"{path}: object {number}"
        if name not in class_names:
            report.add("unknown class", where, unknown_class(name, class_names), name)
            continue
        try:
            box = [parse_number(text) for text in texts]
        except ValueError as error:
            report.add("not a number", where, f"needs a bndbox of four numbers ({error})")
        else:
            yield number, difficult, *box, class_names.index(name)
