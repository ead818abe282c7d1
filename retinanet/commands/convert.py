"""Convert a data set between CSV, COCO, Pascal VOC and YOLO.

    python -m retinanet.convert --from voc --source VOCdevkit/VOC2012 --set train --to coco --out coco_folder

One run converts one set; several sets may go into the same folder. No annotation is overwritten by another one.
Within its picture, no box moves by a pixel or more.
"""

import csv
import filecmp
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from retinanet.commands.flags import FOLDERS, make_parser
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import IMAGE_SUFFIXES, list_images
from retinanet.errors import UserError
from retinanet.process import log, progress, script, setup_logging

PICTURE_FOLDERS = {"csv": "images/{}", "coco": "images/{}", "voc": "JPEGImages", "yolo": "images/{}"}


def plan_images(dataset: DetectionDataset, folder: Path) -> dict[str, Path]:
    """Which pictures shall lie in a folder; nothing is copied yet.

    Returns:
        Name there -> picture: names as before, with those of their folders before them where two would be the same.

    Raises:
        UserError: a picture is missing, two names are the same, or the folder holds another picture of such a name.
    """
    paths = [Path(dataset.image_path(index)) for index in range(len(dataset))]
    # Only their folders are resolved: a link has the picture's name, what it leads to perhaps a hash.
    paths = [path.parent.resolve() / path.name for path in paths]
    names = [path.name for path in paths]
    if len({Path(name).stem for name in names}) < len(names):
        common = Path(os.path.commonpath([path.parent for path in paths]))
        names = ["__".join(path.relative_to(common).parts) for path in paths]
    stems = [Path(name).stem for name in names]
    if len(set(stems)) < len(stems):  # VOC and YOLO know a picture by its name without ending
        twice = next(name for name in names if stems.count(Path(name).stem) > 1)
        raise UserError(f"{twice}: two pictures of one folder differ in nothing but their ending, or stand there twice")
    folder.mkdir(parents=True, exist_ok=True)
    there = {path.stem: path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
    for path, name in zip(paths, names, strict=True):
        if not path.is_file():
            raise UserError(f"{path}: there is no such picture")
        if there.get(Path(name).stem, name) != name:
            raise UserError(f"{folder}: holds {there[Path(name).stem]}, from which {name} differs in its ending alone")
        if (folder / name).exists() and not filecmp.cmp(path, folder / name, shallow=False):
            raise UserError(f"{folder / name}: is there already, and is not {path}")
    return dict(zip(names, paths, strict=True))


def place_images(pictures: dict[str, Path], folder: Path, link: bool) -> None:
    """Copy or link what `plan_images` gave."""
    for name, path in progress(pictures.items(), "pictures", len(pictures)):
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
        UserError: it is there already, with other content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise UserError(f"{path}: is there already, with other content; choose another --out")
    path.write_text(text, encoding="utf-8")


def _write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, as `_write_text` does."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write_text(path, text.getvalue())


def write_csv(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `<set_name>.csv` and `classes.csv`; difficult boxes are left out."""
    _write_rows(root / "classes.csv", [(name, label) for label, name in dataset.labels.items()])
    lines = []
    for index, name in enumerate(names):
        path = f"images/{set_name}/{name}"
        rows = dataset.load_annotations(index).tolist()
        lines += [[path, *(f"{value:.7g}" for value in box), dataset.label_to_name(int(label))] for *box, label in rows]
        if not rows:
            lines.append([path, "", "", "", "", ""])
    _write_rows(root / f"{set_name}.csv", lines)


def write_coco(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `annotations/instances_<set_name>.json`; difficult boxes become crowds, which COCO ignores alike."""
    category_ids = getattr(dataset, "coco_labels", None) or {label: label + 1 for label in dataset.labels}
    image_ids = dataset.image_ids if isinstance(dataset, CocoDataset) else range(1, len(dataset) + 1)
    images, annotations = [], []
    for index, (image_id, name) in enumerate(zip(image_ids, names, strict=True)):
        size = dict(zip(("height", "width"), map(int, dataset.image_sizes[index]), strict=True))
        images.append({"id": image_id, "file_name": name, **size})
        for rows, is_crowd in ((dataset.load_annotations(index), 0), (dataset.load_difficult(index), 1)):
            for x1, y1, x2, y2, label in rows.tolist():
                width, height = round(x2 - x1, 3), round(y2 - y1, 3)
                box = {"bbox": [round(x1, 3), round(y1, 3), width, height], "area": width * height, "iscrowd": is_crowd}
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_ids[int(label)]}
                annotations.append(entry | box)
    categories = [{"id": category_ids[label], "name": name} for label, name in dataset.labels.items()]
    content = {"images": images, "categories": categories, "annotations": annotations}
    _write_text(root / "annotations" / f"instances_{set_name}.json", json.dumps(content))


def write_voc(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `Annotations`, `ImageSets/Main/<set_name>.txt` and `classes.txt`; coordinates become whole pixels."""
    _write_text(root / "classes.txt", "".join(f"{name}\n" for name in dataset.labels.values()))
    _write_text(root / "ImageSets" / "Main" / f"{set_name}.txt", "".join(f"{Path(name).stem}\n" for name in names))
    for index, name in enumerate(names):
        tree = ElementTree.Element("annotation")
        ElementTree.SubElement(tree, "filename").text = name
        size = ElementTree.SubElement(tree, "size")
        for key, value in zip(("height", "width", "depth"), (*dataset.image_sizes[index], 3), strict=True):
            ElementTree.SubElement(size, key).text = str(value)
        for rows, difficult in ((dataset.load_annotations(index), "0"), (dataset.load_difficult(index), "1")):
            for x1, y1, x2, y2, label in rows.tolist():
                entry = ElementTree.SubElement(tree, "object")
                ElementTree.SubElement(entry, "name").text = dataset.label_to_name(int(label))
                ElementTree.SubElement(entry, "difficult").text = difficult
                box = ElementTree.SubElement(entry, "bndbox")
                corner = round(x1) + 1, round(y1) + 1  # VOC counts from 1, and includes the last pixel
                corners = (*corner, max(corner[0], round(x2)), max(corner[1], round(y2)))
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                    ElementTree.SubElement(box, key).text = str(value)
        ElementTree.indent(tree)
        text = ElementTree.tostring(tree, encoding="unicode") + "\n"
        _write_text(root / "Annotations" / f"{Path(name).stem}.xml", text)


def write_yolo(dataset: DetectionDataset, names: Sequence[str], root: Path, set_name: str) -> None:
    """Write `labels/<set_name>`, `classes.txt` and `data.yaml`; boxes are cut at the picture's border."""
    class_names = list(dataset.labels.values())
    _write_text(root / "classes.txt", "".join(f"{name}\n" for name in class_names))
    strangers = set(list_images(root / "images" / set_name)) - {Path(name).stem for name in names}
    if strangers:  # a picture without a label file would count as one without objects
        where = root / "images" / set_name
        raise UserError(f"{where}: holds other pictures, such as {min(strangers)}; choose another --out")
    sets = sorted(path.name for path in (root / "images").iterdir())
    names_line = f"names: {json.dumps(class_names, ensure_ascii=False)}\n"  # JSON is YAML, too
    yaml_path = root / "data.yaml"
    if yaml_path.exists() and not yaml_path.read_text(encoding="utf-8", errors="replace").endswith(names_line):
        raise UserError(f"{yaml_path}: is there already, with other content; choose another --out")
    yaml_path.write_text("".join(f"{name}: images/{name}\n" for name in sets) + names_line, encoding="utf-8")
    for index, name in enumerate(names):
        height, width = dataset.image_sizes[index]
        lines = []
        for x1, y1, x2, y2, label in dataset.load_annotations(index).tolist():
            x1, x2 = (min(max(x / width, 0.0), 1.0) for x in (x1, x2))
            y1, y2 = (min(max(y / height, 0.0), 1.0) for y in (y1, y2))
            if x1 < x2 and y1 < y2:
                numbers = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
                lines.append(f"{int(label)} " + " ".join(f"{number:.8f}" for number in numbers) + "\n")
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
    parser.add_argument("--link", action="store_true", help="link to the pictures instead of copying them")
    args = parser.parse_args(argv)
    if args.kind == "csv" and args.csv_classes is None:
        parser.error("--from csv needs --csv_classes")
    if args.kind != "csv" and args.set is None:
        parser.error(f"--from {args.kind} needs --set")
    setup_logging()

    if args.kind == "csv":
        dataset = CSVDataset(args.source, args.csv_classes)
    else:
        dataset = FOLDERS[args.kind](args.source, args.set)
    vars(dataset).pop("image_sizes", None)  # those that COCO's file declares may be wrong; the pictures' count
    set_name = args.out_set or args.set or Path(args.source).stem
    root = Path(args.out)
    try:
        folder = root / PICTURE_FOLDERS[args.to].format(set_name)
        pictures = plan_images(dataset, folder)
        WRITERS[args.to](dataset, list(pictures), root, set_name)  # first: it may refuse
        place_images(pictures, folder, args.link)
    except OSError as error:
        raise UserError(f"--out {args.out}: {error}") from error
    if args.to == "csv":
        written = CSVDataset(root / f"{set_name}.csv", root / "classes.csv")
    else:
        written = FOLDERS[args.to](root, set_name)
    difficult = len(dataset.difficult_annotations) - len(written.difficult_annotations)
    if difficult and args.to in ("csv", "yolo"):
        log.warning("warning: %d difficult boxes (or crowds) are left out: %s has no mark for them", difficult, args.to)
        difficult = 0
    lost = len(dataset.annotations) - len(written.annotations) + difficult
    if lost:
        log.warning("warning: %d boxes are left out: outside their pictures, or alike once they are rounded", lost)
    log.info(
        "%s: %d pictures, %d boxes (and %d difficult), %d classes",
        root, len(written), len(written.annotations), len(written.difficult_annotations), written.num_classes(),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
