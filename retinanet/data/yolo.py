"""Data sets in YOLO's layouts: one text file per image, one box per line, in fractions of the image's size."""

import glob
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from retinanet.data.classes import class_difference, read_class_list
from retinanet.data.dataset import DetectionDataset
from retinanet.data.files import IMAGE_SUFFIXES, list_images, walk
from retinanet.data.images import read_header
from retinanet.data.layouts import SAME_NAMES, any_case, choose_share, find_places, find_set, refused, report_list
from retinanet.data.reading import parse_number, read_annotations, read_text
from retinanet.data.report import Report, counted
from retinanet.errors import UserError, shown
from retinanet.process import log

# Where the images of a set may lie; a text file lists them, one path per line.
PLACES = ("images/{}", "{}/images", "{}", "{}.txt")
CLASS_LISTS = ("classes.txt", "obj.names", "_darknet.labels")
SETTINGS = ("data.yaml", "data.yml", "dataset.yaml", "obj.data")  # files that name sets and classes
NO_SETS = ("path", "names", "nc", "classes", "backup", "kpt_shape")  # entries of these files that are not sets


class YoloDataset(DetectionDataset):
    """A data set in YOLO's layout, as Darknet, Ultralytics, Roboflow, CVAT and Label Studio write it.

    An image without a text file has no boxes. Outlines (more than four numbers) become their bounding boxes; the key
    points of poses, which `kpt_shape` in `data.yaml` declares, are ignored.

    Args:
        root_dir: holds the class names; a set's images where `data.yaml` or `obj.data` say, or in one of PLACES, or
            else all images, without sets; and their text files beside them, or in `labels` in place of `images`.
        set_name: such as `train`.
        val_share: share of the images for validation, in a folder without sets.
    """

    annotation_format = "{}:{}"

    def __init__(
        self,
        root_dir: str | Path,
        set_name: str = "train",
        transform: Callable[[dict], dict] | None = None,
        val_share: float | None = None,
        report: Report | None = None,
    ):
        root = Path(root_dir)
        report = report or Report()
        settings = {root / name: _read_settings(root / name) for name in SETTINGS if (root / name).is_file()}
        files, source = _find_files(root, set_name, val_share, settings, report)
        class_names = _class_names(root, [root, source, *(file.parent for file in files.values())], settings)
        key_numbers = max((_key_numbers(path, content) for path, content in settings.items()), default=0)

        def read(image: Path, file: Path) -> tuple[tuple[int, int], list]:
            lines = read_text(file).splitlines() if file.is_file() else []
            boxes = list(_read_boxes(file, lines, len(class_names), key_numbers, report))
            return read_header(image)[:2], boxes

        contents = read_annotations(files, read, report)
        sides = contents["declared_sizes"][contents["image_index"], ::-1]  # width and height of each box's image
        contents["annotations"][:, :4] *= np.tile(sides, 2)  # fractions -> pixels
        super().__init__(class_names=class_names, transform=transform, source=source, **contents)


def _read_settings(path: Path) -> dict[str, Any]:
    """The entries of one of SETTINGS; all values of a YAML file stay text, so that `no` does not become False."""
    text = read_text(path)
    if path.suffix == ".data":
        pairs = (line.partition("=") for line in text.splitlines())
        return {key.strip(): value.strip() for key, sign, value in pairs if sign}
    try:
        import yaml  # an optional dependency that nothing else needs
    except ModuleNotFoundError as error:
        message = "is not read, because PyYAML is not installed (pip install 'retinanet[yolo]')"
        if any((path.parent / name).is_file() for name in CLASS_LISTS):
            log.warning("%s: %s", path, message)
            return {}
        raise UserError(f"{path}: {message}, and no {path.parent / 'classes.txt'} lists the class names") from error
    try:
        content = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML, or is nested too deeply ({error})") from error
    return content if isinstance(content, dict) else {"names": None}


def _places(text: str, root: Path, *bases: Path) -> list[Path]:
    """The existing places that a path in a list or in `data.yaml` may mean; tools use different working directories."""
    parts = PurePosixPath(text.replace("\\", "/")).parts
    own = itertools.dropwhile(lambda part: part in ("..", ".", "data"), parts)
    places = [*(Path(base, *parts) for base in (*bases, root)), Path(root, *own)]
    return [path for path in places if os.path.exists(path)]  # noqa: PTH110, pathlib raises errors for impossible names


def _resolve(text: str, root: Path, base: Path) -> Path | None:
    """The place that a path in `data.yaml` means, if it exists; a UserError if there are several."""
    found = {os.path.realpath(path): path for path in _places(text, root, base)}
    if len(found) > 1:
        raise UserError(f"{root}: {shown(text)} may be {' or '.join(map(str, found.values()))}; give the full path")
    return next(iter(found.values()), None)


def _find_sets(root: Path, set_name: str, settings: Mapping[Path, dict]) -> dict[str, list[list[Path]]]:
    """The folders and lists of images of each set, from each source that names it, the most explicit source first."""
    sets: dict[str, list[list[Path]]] = {}
    wanted = {set_name}.union(*(names for names in SAME_NAMES if set_name in names))
    for source, content in settings.items():
        base = root / content["path"] if isinstance(content.get("path"), str) else root
        for name, values in content.items():
            if name in NO_SETS:
                continue
            texts = values if isinstance(values, list) else [values]
            found = {text: _resolve(text, root, base) for text in texts if isinstance(text, str) and text}
            paths = [path for path in found.values() if path]
            if name in wanted and len(paths) < len(found):
                lost = ", ".join(shown(text) for text, path in found.items() if not path)
                message = f"{source}: {lost} of the set {shown(name)} cannot be found"
                if paths:
                    raise UserError(message)
                log.warning("warning: %s; trying the usual folders", message)  # often a path of another computer
            if paths:
                sets.setdefault(name, []).append(paths)
    known = {name for names in (*SAME_NAMES, ["test", set_name]) for name in names}
    for place, written, path in find_places(root, PLACES):
        name = written.lower() if written.lower() in known else written
        if "images" in place:
            is_set = path.is_dir()
        else:  # a list, or a folder with images of its own
            is_set = name in known and (
                path.is_file() or any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.iterdir())
            )
        if is_set:
            sets.setdefault(name, []).append([path])
    return sets


def _find_files(
    root: Path, set_name: str, val_share: float | None, settings: Mapping[Path, dict], report: Report
) -> tuple[dict[Path, Path], Path]:
    """The images of a set with their text files, and the source: the list of images, or the folder of text files."""
    sets = _find_sets(root, set_name, settings)
    flat = [[root / "images" if (root / "images").is_dir() else root]]
    sources, *others = find_set(root, set_name, sets, val_share) if sets else flat
    others = {other[0] for other in others if sources[0].is_dir() and not other[0].samefile(sources[0])}
    message = f"is ignored: the set {shown(set_name)} is read from {sources[0]}"
    report.add_rows("other source", sorted(others), str, message)
    images = dict.fromkeys(path for source in sources for path in _list_source(root, source, report))
    if not images:
        report.raise_errors()
        raise UserError(f"{sources[0]}: holds no images") if sets else refused(root, f"images/{set_name}")
    folders = {folder: _label_folder(folder) for folder in {*sources, *(path.parent for path in images)}}
    files = {path: folders[path.parent] / f"{path.stem}.txt" for path in images}
    _check_files(files, {source: folders[source] for source in sources if source.is_dir()}, report)
    if not sets:
        files = choose_share(root, set_name, val_share, files)
    return files, folders[sources[0]] if sources[0].is_dir() else sources[0]


def _check_files(files: Mapping[Path, Path], folders: Mapping[Path, Path], report: Report) -> None:
    """Raise a UserError if two images share a text file or a folder has none; report text files without an image."""
    owners = {file: path for path, file in files.items()}
    for path, file in files.items():
        if owners[file] != path:
            raise UserError(f"{owners[file]}: differs from {path.name} only in its suffix; remove one of them")
    for folder, labels in folders.items():
        texts = list(walk(labels, {".txt"}))
        if not texts and labels == folder:
            message = "does not exist; it must hold the boxes, unless they lie beside the images"
            raise UserError(f"{_label_folder(folder, must_exist=False)}: {message}")
        stray = [path for path in texts if path not in owners and path.name not in CLASS_LISTS]
        report.add_rows("stray file", stray, str, lambda path: f"no image of the set has the name {path.stem}")


def _list_source(root: Path, source: Path, report: Report) -> list[Path]:
    """The images in a folder, or in a list."""
    if source.is_dir():
        return list(list_images(source).values())
    lines = list(filter(None, map(str.strip, read_text(source).splitlines())))
    places = [next(iter(_places(line, root, source.parent)), None) for line in lines]
    found = [path and Path(os.path.normpath(path)) for path in places]
    report_list(source, root, lines, found, report)
    return list(filter(None, found))


def _label_folder(folder: Path, must_exist: bool = True) -> Path:
    """The folder of the text files of a folder's images: with `labels` for `images` in its path, or the same folder."""
    parts = folder.parts
    last = max((place for place, part in enumerate(parts) if part.lower() == "images"), default=len(parts))
    labels, base = Path("labels", *parts[last + 1 :]), Path(*parts[:last])
    choices = [base / labels, *sorted(base.glob(any_case(glob.escape(str(labels)))))]
    return next((path for path in choices if path.is_dir()), folder if must_exist else choices[0])


def _class_names(root: Path, folders: Iterable[Path], settings: Mapping[Path, dict]) -> list[str]:
    """The class names; all files that name classes must agree."""
    paths = [folder / name for folder in dict.fromkeys(folders) for name in CLASS_LISTS]
    for content in settings.values():
        if isinstance(text := content.get("names"), str) and (path := _resolve(text, root, root)):
            paths.append(path)
    sources = {path: names for path in paths if (names := read_class_list(path))}
    for path, content in settings.items():
        if path.suffix != ".data" and ("names" in content or not sources):
            sources[path] = _yaml_names(path, content.get("names"))
    if not sources:
        raise UserError(f"{root}: has neither classes.txt nor data.yaml to name the classes")
    (first, names), *others = sources.items()
    for path, other in others:
        if difference := class_difference(str(first), names, str(path), other):
            raise UserError(f"{difference}; correct or remove the wrong file")
    for path, content in settings.items():
        key = "classes" if path.suffix == ".data" else "nc"
        if isinstance(number := content.get(key), str) and number.strip() not in ("", str(len(names))):
            raise UserError(f"{path}: `{key}` is {shown(number)}, but {first} names {counted(len(names), 'class')}")
    return names


def _yaml_names(path: Path, names: Any) -> list[str]:
    if isinstance(names, dict) and set(names) == {str(label) for label in range(len(names))}:
        names = [names[str(label)] for label in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: needs `names`: a list, or a mapping from 0, 1, 2, ... to names")
    if len(set(names)) < len(names) or not all(map(str.strip, names)):
        raise UserError(f"{path}: the `names` must differ, and none may be empty")
    return names


def _key_numbers(path: Path, content: Mapping[str, Any]) -> int:
    """How many numbers of key points follow each box; 0 if there are no poses."""
    shape = content.get("kpt_shape", [])
    if not isinstance(shape, list) or not all(re.fullmatch("[0-9]{1,4}", str(side)) for side in shape):
        raise UserError(f"{path}: kpt_shape must be two whole numbers, not {shown(shape)}")
    return math.prod(map(int, shape)) if shape else 0


def _read_boxes(
    path: Path, lines: Sequence[str], num_classes: int, key_numbers: int, report: Report
) -> Iterator[tuple[float, ...]]:
    """Line number (from 1), False, x1, y1, x2, y2 (fractions of the image's size) and label of each box."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            label, *values = map(parse_number, line.split())
        except ValueError as error:
            report.add("not a number", where, f"expected numbers ({error})")
            continue
        if len(values) in (4, 4 + key_numbers):
            x, y, width, height = values[:4]
            points = corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        elif len(values) >= 6 and len(values) % 2 == 0 and not key_numbers:
            points, corners = values, [min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2])]
        else:
            message = f"expected `class x y width height`, found {len(values) + 1} numbers"
            report.add("wrong column count", where, message)
            continue
        if label not in range(num_classes):
            report.add("unknown class", where, f"class {label:g} is not one of 0 to {num_classes - 1}", label)
        # Values slightly outside 0 to 1 were rounded; values far outside are pixels instead of fractions.
        elif not all(-0.5 < value < 1.5 for value in points):
            report.add("bad entry", where, "a box must be in fractions of the image's size, from 0 to 1")
        else:
            yield number, False, *corners, label
