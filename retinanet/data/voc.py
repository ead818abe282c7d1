"""Data sets in Pascal VOC's layout and similar ones: one XML file per image.

    <annotation><filename>a.jpg</filename><size><width>640</width><height>480</height></size>
      <object><name>car</name><difficult>0</difficult>
        <bndbox><xmin>11</xmin><ymin>21</ymin><xmax>110</xmax><ymax>220</ymax></bndbox></object></annotation>

VOC counts pixels from 1 and includes the last one: this box goes from x = 10 to 110, and from y = 20 to 220.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple
from xml.etree import ElementTree

from retinanet.data.classes import read_class_list, unknown_class
from retinanet.data.dataset import DetectionDataset
from retinanet.data.files import IMAGE_SUFFIXES, list_images, walk
from retinanet.data.layouts import choose_share, find_set, refused, report_list
from retinanet.data.reading import parse_number, parse_side, read_annotations, read_bytes, read_text
from retinanet.data.report import FileError, Report
from retinanet.errors import UserError, shown

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
# Folders of the lists of sets, of the XML files and of the images, the latter two in any case. Without these folders,
# XML files and images lie beside each other.
LISTS = ("ImageSets/Main", "ImageSets")
XML = {".xml"}
XML_FOLDERS = ("annotations", "annotation", "xmls", "xml", "labels")
IMAGE_FOLDERS = ("jpegimages", "images", "image", "imgs", "img")


class VOCDataset(DetectionDataset):
    """A data set in Pascal VOC's layout or a similar one. Boxes marked `difficult` are neither trained on nor scored.

    Args:
        root_dir: holds `Annotations`, `JPEGImages` and `ImageSets/Main/<set_name>.txt`, such as `VOCdevkit/VOC2012`;
            or, without lists, a folder `<set_name>` with images and XML files for each set; or all files, without sets.
        set_name: such as `train`.
        class_names: the classes, in order; default: those in `classes.txt` in `root_dir`, or else VOC's twenty, or, if
            the XML files have others, all classes in the XML files, sorted.
        val_share: share of the images for validation, in a folder without sets.
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
        root = Path(root_dir)
        report = report or Report()
        list_file, base = _find_set(root, set_name, val_share)
        folder = _subfolder(base, XML_FOLDERS)
        content_of = functools.cache(_read_xml)
        if class_names is None:
            class_names = read_class_list(root / "classes.txt")
        if class_names is None:  # the classes of all sets together, so that the sets agree
            xml_files = walk(folder if base == root else root, XML)
            used = {name for path in xml_files for name, *_ in content_of(path).objects} - {""}
            class_names = VOC_CLASSES if used <= set(VOC_CLASSES) else sorted(used)
        pairs = _pair_files(list_file, folder, _subfolder(base, IMAGE_FOLDERS), content_of, report)
        if not list_file and base == root:  # there are no sets
            pairs = choose_share(root, set_name, val_share, pairs)

        def read(_: Path, path: Path | None) -> tuple[tuple[int, int], list]:
            content = content_of(path) if path else _Content()
            if content.fault:
                raise FileError(str(path), content.fault)
            if min(content.size) < 0:
                message = "height or width is not a whole number, so those of the image file are used"
                report.add("declared size", str(path), message, "")
            size = content.size if min(content.size) > 0 else (0, 0)
            return size, list(_read_objects(path, content.objects, class_names, report))

        contents = read_annotations(pairs, read, report)
        super().__init__(class_names=class_names, transform=transform, source=list_file or folder, **contents)


def _find_set(root: Path, set_name: str, val_share: float | None) -> tuple[Path | None, Path]:
    """The list of a set, if there are lists, and the folder that holds its files."""
    if not root.is_dir():
        raise refused(root, "")
    sets = {path.stem: (path, root) for place in LISTS for path in sorted(root.glob(f"{place}/*.txt"))}
    if not sets and _subfolder(root, XML_FOLDERS) == root and not any(root.glob("*.xml")):
        sets = {path.name: (None, path) for path in root.iterdir() if path.is_dir() and any(walk(path, XML))}
        if not sets:
            raise refused(root, f"ImageSets/Main/{set_name}.txt, and no XML files")
    return find_set(root, set_name, sets, val_share) if sets else (None, root)


def _subfolder(base: Path, names: Sequence[str]) -> Path:
    """The first of some folders that exists, in upper or lower case; or else the base."""
    folders = {path.name.lower(): path for path in base.iterdir() if path.is_dir()}
    return _first(folders, names) or base


def _first(paths: Mapping[str, Path], names: Iterable[str]) -> Path | None:
    """The path of the first of some names that has one."""
    return next((paths[name] for name in names if name in paths), None)


def _read_list(path: Path) -> list[tuple[str, list[str]]]:
    """The lines of a list, each with the possible names of its image.

    Lists for one class have a second column, names may contain spaces, and some tools list file names or paths.
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
    list_file: Path | None, folder: Path, image_folder: Path, content_of: Callable[[Path], "_Content"], report: Report
) -> dict[Path, Path | None]:
    """The images of a list, or of all XML files, with their XML files.

    An image has the name of its XML file, or the one that the XML file gives in `<filename>`.
    """
    xml_files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in walk(folder, XML)}
    lines = _read_list(list_file) if list_file else [(name, [name]) for name in xml_files]
    files = [_first(xml_files, names) for _, names in lines]
    own_names = [content_of(path).file_name if path else "" for path in files]
    images = list_images(image_folder, {name for _, names in lines for name in names}, set(own_names))
    choices = [[*names, Path(own_name).stem] for (_, names), own_name in zip(lines, own_names, strict=True)]
    found = [_first(images, names) for names in choices]
    report_list(list_file or folder, image_folder, [line for line, _ in lines], found, report)
    pairs = {image: path for image, path in zip(found, files, strict=True) if image}
    without = [image for image, path in pairs.items() if path is None]
    needed = "an image without objects needs an XML file without <object>"
    if not list_file:
        message = f"has no XML file, and is left out; {needed}"
        report.add_rows("stray file", sorted(set(images.values()) - set(pairs)), str, message, "no XML")
    elif len(without) > len(pairs) / 2:
        message = f"{len(without):,} of the {len(pairs):,} listed images, such as {without[0].name}, have no XML file"
        report.add("bad entry", str(folder), f"{message}; {needed}", "no XML", len(without))
    else:
        message = "has no XML file, and is read as an image without objects"
        report.add_rows("no annotations", without, str, message, "no XML")
    return pairs


class _Content(NamedTuple):
    """The content of an XML file, or why it cannot be read."""

    file_name: str = ""  # of the image
    size: tuple[int, int] = (0, 0)  # height and width, by `parse_side`
    objects: Sequence[tuple[str, bool, list[str]]] = ()  # class, `difficult`, xmin, ymin, xmax, ymax
    fault: str = ""


def _read_xml(path: Path) -> _Content:
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except FileError as error:
        return _Content(fault=error.message)
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the latter two from unknown encodings
        return _Content(fault=f"is not valid XML ({error})")
    for entry in root.iter():  # tags without namespaces, in lower case
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
    file_name = PureWindowsPath(root.findtext("filename", "").strip()).name  # paths with either slash
    return _Content(file_name, size, objects)


def _read_objects(
    path: Path | None, objects: Sequence[tuple], class_names: Sequence[str], report: Report
) -> Iterator[tuple[float, ...]]:
    """Number (from 1), `difficult`, x1, y1, x2, y2 (pixels from 0) and label of each object of an image."""
    for number, (name, difficult, texts) in enumerate(objects, start=1):
        where = f"{path}: object {number}"
        if name not in class_names:
            report.add("unknown class", where, unknown_class(name, class_names), name)
            continue
        try:
            x1, y1, x2, y2 = map(parse_number, texts)
        except ValueError as error:
            report.add("not a number", where, f"needs a bndbox of four numbers ({error})")
        else:  # clipped at 0, because some tools count pixels from 0 nevertheless
            yield number, difficult, max(x1 - 1, 0), max(y1 - 1, 0), x2, y2, class_names.index(name)
