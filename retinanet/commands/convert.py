"""Convert a data set between CSV, COCO, Pascal VOC and YOLO.

    python -m retinanet convert --from voc --source VOCdevkit/VOC2012 --set train --to coco --out coco_folder

One run converts one set; several sets may be written to the same folder. Nothing is overwritten with other content.
Inside its image, no box moves by a pixel or more.
"""

import csv
import filecmp
import io
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from retinanet.commands.flags import FOLDERS, make_parser
from retinanet.data.csv import CSVDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.data.ground_truth import coco_content
from retinanet.data.images import IMAGE_SUFFIXES, list_images
from retinanet.errors import UserError
from retinanet.process import log, progress, script, setup_logging

IMAGE_FOLDERS = {"csv": "images/{}", "coco": "images/{}", "voc": "JPEGImages", "yolo": "images/{}"}


def plan_images(dataset: DetectionDataset, folder: Path) -> dict[str, Path]:
    """Choose the images' names in a folder; nothing is copied yet.

    Returns:
        New name -> image: the old names, or all with the names of their folders in front if two are the same.

    Raises:
        UserError: an image is missing, two names are the same, or the folder holds another image with such a name.
    """
    paths = [Path(dataset.image_path(index)) for index in range(len(dataset))]
    # Only the folders are resolved: the target of a link may have another name, such as a hash.
    paths = [path.parent.resolve() / path.name for path in paths]
    names = [path.name for path in paths]
    if len({Path(name).stem for name in names}) < len(names):
        common = Path(os.path.commonpath([path.parent for path in paths]))
        names = ["__".join(path.relative_to(common).parts) for path in paths]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):  # VOC and YOLO name an image without its suffix
        repeated = next(name for name in names if stems.count(Path(name).stem) > 1)
        raise UserError(f"{repeated}: two images of one folder have this name, or differ only in their suffix")
    folder.mkdir(parents=True, exist_ok=True)
    existing = {path.stem: path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for path, name in zip(paths, names, strict=True):
        if not path.is_file():
            raise UserError(f"{path}: the image does not exist")
        other = existing.get(Path(name).stem, name)
        if other != name:
            raise UserError(f"{folder}: holds {other}, which differs from {name} only in its suffix")
        if (folder / name).exists() and not filecmp.cmp(path, folder / name, shallow=False):
            raise UserError(f"{folder / name}: exists and differs from {path}")
    return dict(zip(names, paths, strict=True))


def place_images(images: dict[str, Path], folder: Path, link: bool) -> None:
    """Copy or link the result of `plan_images`."""
    for name, path in progress(images.items(), "images", len(images)):
        target = folder / name
        if target.exists():
            continue
        if link:
            target.symlink_to(path.resolve())
        else:
            shutil.copyfile(path, target)


def _write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        UserError: it exists with other content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"{path}: exists with other content; choose another --out")
    path.write_text(text, encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file; errors are those of `_write_text`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write_text(path, text.getvalue())


def write_csv(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `<set_name>.csv` and `classes.csv`; difficult boxes are left out."""
    _write_rows(root / "classes.csv", [(name, label) for label, name in dataset.labels.items()])
    lines = []
    for index, name in enumerate(names):
        path = f"images/{set_name}/{name}"
        boxes = [
            [path, *(f"{value:.7g}" for value in box), dataset.label_to_name(int(label))]
            for *box, label in dataset.load_annotations(index).tolist()
        ]
        lines += boxes or [[path, "", "", "", "", ""]]
    _write_rows(root / f"{set_name}.csv", lines)


def write_coco(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `annotations/instances_<set_name>.json`; difficult boxes become crowds, which COCO ignores as well."""
    content = coco_content(dataset, file_names=names)
    _write_text(root / "annotations" / f"instances_{set_name}.json", json.dumps(content))


def _add(parent: ElementTree.Element, tag: str, **texts: object) -> ElementTree.Element:
    """Add an element to an XML tree, with a child for each text."""
    element = ElementTree.SubElement(parent, tag)
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = str(text)
    return element


def write_voc(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `Annotations`, `ImageSets/Main/<set_name>.txt` and `classes.txt`; coordinates become whole pixels."""
    _write_text(root / "classes.txt", "".join(f"{name}\n" for name in dataset.labels.values()))
    _write_text(root / "ImageSets" / "Main" / f"{set_name}.txt", "".join(f"{Path(name).stem}\n" for name in names))
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
        _write_text(root / "Annotations" / f"{Path(name).stem}.xml", text)


def write_yolo(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `labels/<set_name>`, `classes.txt` and `data.yaml`; boxes are clipped to the image."""
    class_names = list(dataset.labels.values())
    _write_text(root / "classes.txt", "".join(f"{name}\n" for name in class_names))
    folder = root / "images" / set_name
    others = set(list_images(folder)) - {Path(name).stem for name in names}
    if others:  # without a label file, an image counts as one without objects
        raise UserError(f"{folder}: holds other images, such as {min(others)}; choose another --out")
    sets = sorted(path.name for path in (root / "images").iterdir())
    names_line = f"names: {json.dumps(class_names, ensure_ascii=False)}\n"  # JSON is YAML, too
    yaml_path = root / "data.yaml"
    if yaml_path.exists() and not yaml_path.read_text(encoding="utf-8", errors="replace").endswith(names_line):
        raise UserError(f"{yaml_path}: exists with other content; choose another --out")
    yaml_path.write_text("".join(f"{name}: images/{name}\n" for name in sets) + names_line, encoding="utf-8")
    for index, name in enumerate(names):
        annotations = dataset.load_annotations(index).astype(np.float64)
        corners = (annotations[:, :4].reshape(-1, 2, 2) / dataset.image_sizes[index][::-1]).clip(0, 1)  # [G, 2, (x, y)]
        sides = corners[:, 1] - corners[:, 0]
        table = np.hstack([annotations[:, 4:], corners.mean(axis=1), sides])[(sides > 0).all(axis=1)]
        lines = [f"{int(label)} {' '.join(f'{number:.8f}' for number in box)}\n" for label, *box in table.tolist()]
        _write_text(root / "labels" / set_name / f"{Path(name).stem}.txt", "".join(lines))


WRITERS = {"csv": write_csv, "coco": write_coco, "voc": write_voc, "yolo": write_yolo}


@script
def main(argv: list[str] | None = None) -> None:
    """Convert as the flags say."""
    parser = make_parser(__doc__.split("\n")[0])
    parser.add_argument("--from", dest="kind", choices=sorted(WRITERS), required=True, help="layout of the source")
    parser.add_argument("--source", required=True, help="the data set's folder; of CSV data, the annotation file")
    parser.add_argument("--set", help="name of the set, such as train or val2017 (default: the CSV file's name)")
    parser.add_argument("--csv_classes", help="of CSV data: the file class_name,id")
    parser.add_argument("--to", choices=sorted(WRITERS), required=True, help="layout to write")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--out_set", help="name of the set there, such as train (default: as in the source)")
    parser.add_argument("--link", action="store_true", help="link to the images instead of copying them")
    args = parser.parse_args(argv)
    needed = "csv_classes" if args.kind == "csv" else "set"
    if getattr(args, needed) is None:
        parser.error(f"--from {args.kind} needs --{needed}")
    setup_logging()

    is_csv = args.kind == "csv"
    dataset = CSVDataset(args.source, args.csv_classes) if is_csv else FOLDERS[args.kind](args.source, args.set)
    dataset.declared_sizes = None  # they may be wrong: sizes are read from the images
    set_name = args.out_set or args.set or Path(args.source).stem
    root = Path(args.out)
    try:
        folder = root / IMAGE_FOLDERS[args.to].format(set_name)
        images = plan_images(dataset, folder)
        WRITERS[args.to](dataset, list(images), root, set_name)  # before the images, because it may refuse
        place_images(images, folder, args.link)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error}") from error
    if args.to == "csv":
        report(dataset, CSVDataset(root / f"{set_name}.csv", root / "classes.csv"), args.to, root)
    else:
        report(dataset, FOLDERS[args.to](root, set_name), args.to, root)


def report(dataset: DetectionDataset, written: DetectionDataset, kind: str, root: Path) -> None:
    """Log what was written, read back from the files, and what was lost."""
    difficult = len(dataset.difficult_annotations) - len(written.difficult_annotations)
    if difficult and kind in ("csv", "yolo"):
        log.warning("warning: %d difficult boxes (or crowds) are left out: %s cannot mark them", difficult, kind)
        difficult = 0
    lost = len(dataset.annotations) - len(written.annotations) + difficult
    if lost:
        log.warning("warning: %d boxes are left out: outside their images, or equal after rounding", lost)
    log.info(
        "%s: %d images, %d boxes (and %d difficult), %d classes",
        root, len(written), len(written.annotations), len(written.difficult_annotations), written.num_classes(),
    )  # fmt: skip
