"""Convert a data set between CSV, COCO, Pascal VOC and YOLO.

    python -m retinanet convert --from voc --source VOCdevkit/VOC2012 --set train --to coco --out coco_folder

Each run converts one set; several sets may be written to the same folder. No file is overwritten with other content.
The part of a box inside its image moves by less than a pixel.
"""

import csv
import filecmp
import io
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from retinanet.commands.flags import FOLDERS, SKIP_BAD, make_parser
from retinanet.data.checks import leave_out_bad_images, write_skipped
from retinanet.data.csv import CSVDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.data.files import IMAGE_SUFFIXES, list_images
from retinanet.data.ground_truth import coco_content
from retinanet.data.placing import place_boxes, read_headers
from retinanet.data.report import Report, counted
from retinanet.errors import UserError, listed, output_file, shown
from retinanet.process import log, progress, script, setup_logging

# Characters that cannot be written to XML or UTF-8, or that readers take for the end of a line.
UNWRITABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def is_plain(name: str) -> bool:
    """Whether a name is read back unchanged from a line of a text file and from an XML file."""
    return bool(name) and name == name.strip() and not UNWRITABLE.search(name)


def plan_images(dataset: DetectionDataset, root: Path, folder: Path, to: str) -> dict[str, Path]:
    """Choose names for the images in `folder`, below `root`: the old ones, with their folders in front if two clash.

    The folder is created, but nothing is written to it. Returns new name -> image. A UserError if an image is missing,
    the layout cannot hold a name, or the folder holds another image with such a name or is outside `root`.
    """
    paths = [Path(dataset.image_path(index)) for index in range(len(dataset))]
    # Links to folders are resolved, but not links to images: their targets may have other names, such as hashes.
    paths = [path.parent.resolve() / path.name for path in paths]
    names = [path.name for path in paths]
    if len({path.stem for path in paths}) < len(paths):
        common = Path(os.path.commonpath([path.parent for path in paths]))
        names = ["__".join(path.relative_to(common).parts) for path in paths]
    stems = Counter(Path(name).stem for name in names)
    if repeated := next((name for name in names if stems[Path(name).stem] > 1), None):
        # VOC and YOLO name an image without its suffix.
        raise UserError(f"{repeated}: two images have this name, or names that differ only in their suffix")
    if to != "coco":  # JSON holds any name
        hidden = "." if to in ("voc", "yolo") else "\0"  # files that their readers skip
        unfit = [f"class {shown(name)}" for name in dataset.labels.values() if not is_plain(name)]
        for name in names:
            if not (is_plain(name) and is_plain(Path(name).stem)) or name.startswith(hidden):
                unfit.append(f"image {shown(name)}")
        if unfit:
            which = listed(unfit, 10)
            raise UserError(f"{to} cannot hold these names: {which}; rename them in the source, or use --to coco")
    _make_folder(root, folder)
    images = dict(zip(names, paths, strict=True))
    existing = {path.stem: path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for name, path in images.items():
        target = folder / name
        if (other := existing.get(target.stem, name)) != name:
            raise UserError(f"{folder}: holds {other}, which differs from {name} only in its suffix")
        if os.path.lexists(target) and not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
            raise UserError(f"{target}: exists and differs from {path}")
    return images


def _make_folder(root: Path, folder: Path) -> None:
    """Create a folder below `root`; a UserError if a link leads out of `root`."""
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{folder}: leads out of --out {root}")
    folder.mkdir(parents=True, exist_ok=True)


def _write_text(root: Path, name: str, text: str, same: Callable[[str, str], bool] = str.__eq__) -> None:
    """Write a file below `root`; a UserError if it exists with other content."""
    path = output_file(root / name)
    _make_folder(root, path.parent)
    if path.exists() and not same(path.read_text(encoding="utf-8", errors="replace"), text):
        raise UserError(f"{path}: exists with other content; choose another --out")
    path.write_text(text, encoding="utf-8")


def write_csv(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `<set_name>.csv` and `classes.csv`; difficult boxes are left out."""
    rows = []
    for index, name in enumerate(names):
        path = f"images/{set_name}/{name}"
        boxes = [
            [path, *(f"{value:.7g}" for value in box), dataset.label_to_name(int(label))]
            for *box, label in dataset.load_annotations(index).tolist()
        ]
        rows += boxes or [[path, "", "", "", "", ""]]
    classes = [(name, label) for label, name in dataset.labels.items()]
    for file, content in (("classes.csv", classes), (f"{set_name}.csv", rows)):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(content)
        _write_text(root, file, text.getvalue())


def write_coco(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `annotations/instances_<set_name>.json`; difficult boxes become crowds, which COCO ignores as well."""
    content = coco_content(dataset, file_names=names)
    _write_text(root, f"annotations/instances_{set_name}.json", json.dumps(content))


def _add(parent: ElementTree.Element, tag: str, **texts: object) -> ElementTree.Element:
    """Add an element to an XML tree, with a child for each text."""
    element = ElementTree.SubElement(parent, tag)
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = str(text)
    return element


def write_voc(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `Annotations`, `ImageSets/Main/<set_name>.txt` and `classes.txt`; coordinates become whole pixels."""
    _write_text(root, "classes.txt", "".join(f"{name}\n" for name in dataset.labels.values()))
    _write_text(root, f"ImageSets/Main/{set_name}.txt", "".join(f"{Path(name).stem}\n" for name in names))
    for index, name in enumerate(names):
        height, width = dataset.image_sizes[index]
        tree = ElementTree.Element("annotation")
        _add(tree, "filename").text = name
        _add(tree, "size", height=height, width=width, depth=3)
        for annotations, difficult in ((dataset.load_annotations(index), 0), (dataset.load_difficult(index), 1)):
            for x1, y1, x2, y2, label in annotations.tolist():
                element = _add(tree, "object", name=dataset.label_to_name(int(label)), difficult=difficult)
                x, y = round(x1) + 1, round(y1) + 1  # VOC counts pixels from 1, and includes the last one
                _add(element, "bndbox", xmin=x, ymin=y, xmax=max(x, round(x2)), ymax=max(y, round(y2)))
        ElementTree.indent(tree)
        text = ElementTree.tostring(tree, encoding="unicode") + "\n"
        _write_text(root, f"Annotations/{Path(name).stem}.xml", text)


def write_yolo(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `labels/<set_name>`, `classes.txt` and `data.yaml`; boxes are clipped to the image."""
    class_names = list(dataset.labels.values())
    _write_text(root, "classes.txt", "".join(f"{name}\n" for name in class_names))
    folder = root / "images" / set_name
    others = set(list_images(folder)) - {Path(name).stem for name in names}
    if others:  # without label files, they would be read as images without objects
        raise UserError(f"{folder}: holds other images, such as {min(others)}; choose another --out")
    sets = sorted(path.name for path in (root / "images").iterdir() if path.is_dir())
    names_line = f"names: {json.dumps(class_names, ensure_ascii=False)}\n"  # JSON is YAML, too
    text = "".join(f"{name}: images/{name}\n" for name in sets) + names_line
    _write_text(root, "data.yaml", text, same=lambda old, _: old.endswith(names_line))  # other sets may be added
    for index, name in enumerate(names):
        annotations = dataset.load_annotations(index).astype(np.float64)
        corners = (annotations[:, :4].reshape(-1, 2, 2) / dataset.image_sizes[index][::-1]).clip(0, 1)  # [G, 2, (x, y)]
        sides = corners[:, 1] - corners[:, 0]
        table = np.hstack([annotations[:, 4:], corners.mean(axis=1), sides])[(sides > 0).all(axis=1)]
        lines = [f"{int(label)} {' '.join(f'{number:.8f}' for number in box)}\n" for label, *box in table.tolist()]
        _write_text(root, f"labels/{set_name}/{Path(name).stem}.txt", "".join(lines))


WRITERS = {"csv": write_csv, "coco": write_coco, "voc": write_voc, "yolo": write_yolo}


@script
def main(argv: list[str] | None = None) -> None:
    """Convert as the flags say."""
    parser = make_parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--from", dest="kind", choices=sorted(WRITERS), required=True, help="layout of the source")
    add("--source", required=True, help="the data set's folder or, for CSV data, the annotation file")
    add("--set", help="name of the set, such as train or val2017 (default: the CSV file's name)")
    add("--csv_classes", help="for CSV data: the file class_name,id (default: all classes, sorted)")
    add("--crowds_are_objects", action="store_true", help="for COCO data: read crowds as objects")
    add("--to", choices=sorted(WRITERS), required=True, help="layout to write")
    add("--out", required=True, help="folder to write to")
    add("--out_set", help="name of the set to write, such as train (default: as in the source)")
    add("--link", action="store_true", help="link to the images instead of copying them")
    add("--skip_bad", action="store_true", help=SKIP_BAD)
    args = parser.parse_args(argv)
    set_name = args.out_set or (Path(args.set).name.removesuffix(".json") if args.set else Path(args.source).stem)
    errors = []
    if args.kind != "csv" and args.set is None:
        errors.append(f"--from {args.kind} needs --set")
    if args.crowds_are_objects and args.kind != "coco":
        errors.append("--crowds_are_objects needs --from coco")
    if not is_plain(set_name) or set_name[0] == "." or set(set_name) & set("/\\:#\"'"):
        name = shown(set_name)
        errors.append(f"the name of the set, {name}, must be a plain word; choose another --out_set, such as train")
    if errors:
        parser.error("; ".join(errors))
    setup_logging()

    found = Report(skip_bad=args.skip_bad)
    if args.kind == "csv":
        dataset = CSVDataset(args.source, args.csv_classes, report=found)
    else:
        options = {"crowds_are_objects": True} if args.crowds_are_objects else {}
        dataset = FOLDERS[args.kind](args.source, args.set, report=found, **options)
    place_boxes(dataset, *read_headers(dataset, range(len(dataset))))
    if args.skip_bad:
        leave_out_bad_images(dataset, workers=2)
    found.raise_errors()
    if kinds := found.warnings():
        log.warning("%s", found.text(kinds, max_examples=3))
    root = Path(args.out)
    try:
        folder = root / ("JPEGImages" if args.to == "voc" else f"images/{set_name}")
        images = plan_images(dataset, root, folder, args.to)
        WRITERS[args.to](dataset, list(images), root, set_name)  # before the images, because it may raise
        for name, path in progress(images.items(), "images", len(images)):
            if args.link and not (folder / name).exists():
                (folder / name).symlink_to(path.resolve())
            elif not (folder / name).exists():
                shutil.copyfile(path, folder / name)
        write_skipped(root, [dataset])
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.filename or ''}: {error.strerror}") from error
    is_csv = args.to == "csv"
    written = CSVDataset(root / f"{set_name}.csv", root / "classes.csv") if is_csv else FOLDERS[args.to](root, set_name)
    report(dataset, written, list(images), args.to, root)


def report(dataset: DetectionDataset, written: DetectionDataset, names: list[str], kind: str, root: Path) -> None:
    """Log what the written files hold, and what was lost; a UserError if a class or an image changed."""
    written_names = [Path(written.image_path(index)).name for index in range(len(written))]
    for what, before, after in (
        ("classes", list(dataset.labels.values()), list(written.labels.values())),
        ("images", sorted(names), sorted(written_names)),
    ):
        for old, new in itertools.zip_longest(before, after):
            if old != new:
                message = f"{shown(old)} is read back as {shown(new)}; do not use these files"
                raise UserError(f"{root}: the {what} differ from those of the source: {message}")
    unmarked = len(dataset.difficult_annotations) if kind in ("csv", "yolo") else 0
    if unmarked:
        what = counted(unmarked, "difficult box")
        log.warning("warning: left out: %s (crowds, in COCO), which %s files cannot mark", what, kind)
    in_source, in_written = (len(one.annotations) + len(one.difficult_annotations) for one in (dataset, written))
    if lost := in_source - in_written - unmarked:
        log.warning("warning: left out: %s, outside the image or equal to another after rounding", counted(lost, "box"))
    images, boxes = counted(len(written), "image"), counted(len(written.annotations), "box")
    difficult, classes = len(written.difficult_annotations), counted(written.num_classes(), "class")
    log.info("%s: %s, %s (and %d difficult), %s", root, images, boxes, difficult, classes)
