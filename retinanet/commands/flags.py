"""Flags that several commands share, their checks, and the data sets that they describe."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.checks import leave_out_bad_images
from retinanet.data.classes import placeholder_names
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.data.images import PIXEL_LIMIT
from retinanet.data.pixels import checked_range
from retinanet.data.report import Report
from retinanet.data.tables import read_table
from retinanet.data.tiles import BACKGROUND, OVERLAP
from retinanet.data.transforms import FLIPS
from retinanet.data.voc import VOCDataset
from retinanet.data.yolo import YoloDataset
from retinanet.process import PRECISIONS
from retinanet.training import settings
from retinanet.training.checkpoint import LIMITS

FOLDERS = {"coco": CocoDataset, "voc": VOCDataset, "yolo": YoloDataset}  # kinds of data named by a folder and a set
NUMBER = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
DEFAULT = "(default: %(default)s)"  # argparse fills in the value


def _number(kind: type, low: float, high: float, rule: str) -> Callable[[str], Any]:
    """Argparse type: a number in a range; whole numbers may be written as 1e3, too. A ValueError is a usage error."""

    def number(text: str) -> Any:
        if not NUMBER.fullmatch(text):  # Python itself would also accept 1_000, +1 and digits of all scripts
            raise ValueError
        value = float(text) if kind is float or not text.isdecimal() else int(text)
        if kind is int and value % 1:
            raise ValueError
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text}")
        return kind(value)

    number.__name__ = {int: "whole number", float: "number"}[kind]  # in argparse's message
    return number


positive_int = _number(int, 1, 2**63 - 1, "at least 1 and below 2 ** 63")
non_negative_int = _number(int, 0, 2**63 - 1, "at least 0 and below 2 ** 63")
positive_float = _number(float, sys.float_info.min, sys.float_info.max, "above 0 and finite")
fraction = _number(float, 0, 1, "from 0 to 1")


# The ranges of flags, in every command: beyond them, memory runs out or arithmetic fails without a message.
BOUNDS = settings.BOUNDS | {
    **dict.fromkeys(("height", "width"), (1, 16_384)),  # pixels
    **dict.fromkeys(("shapes_train", "shapes_val"), (1, 10**6)),
    "columns": (1, 100),
    "pixel_limit": (0.000_1, 100_000),
    "every": (1, 10**6),
}
OUTPUTS = ("out_dir", "out", "output", "save_csv")
SKIP_BAD = "leave out images that cannot be read and annotations that are corrupt; decodes all images first"
SAVE_CSV = "write a line for each detection, file,class,score,x1,y1,x2,y2, and to FILE_counts.csv one for each image"


class _PixelRange(argparse.Action):
    """Argparse action: `auto`, which becomes None, or two rising numbers."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        try:
            chosen = None if values == ["auto"] else checked_range(values)
        except ValueError:
            text = f"must be auto or two numbers, the second larger than the first, not {' '.join(values)[:100]}"
            parser.error(f"argument --pixel_range: {text}")
        setattr(namespace, self.dest, chosen)


class _Parser(argparse.ArgumentParser):
    """A parser that checks that all numbers are within BOUNDS and that no output has an empty name."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        values, rest = super().parse_known_args(*args, **kwargs)
        errors = [f"--{flag} is empty" for flag in OUTPUTS if getattr(values, flag, None) == ""]
        for flag, (low, high) in BOUNDS.items():
            for number in np.ravel(getattr(values, flag, None) or []).tolist():
                if number != "best" and not low <= number <= high:  # --score_threshold may be best
                    errors.append(f"--{flag} must be from {low:g} to {high:,}, not {number}")
        if errors:
            self.error("; ".join(errors))
        return values, rest


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser without abbreviations, so that flags of later versions cannot change the meaning of a command."""
    return _Parser(description=description, prog=Path(sys.argv[0]).name, allow_abbrev=False)


def add_data_arguments(parser: argparse.ArgumentParser, training: bool, required: bool = True) -> None:
    """Add the flags that name the data, with or without those of the training set."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=sorted([*FOLDERS, "csv", "shapes"]), required=required, help="kind of data")
    text = "folder with annotations/instances_SET.json and images/SET/, or with SET/_annotations.coco.json; or folder "
    add("--coco_path", help=f"{text}of the images, if the set is the path of a JSON file")
    text = "folder with Annotations, JPEGImages and ImageSets/Main, or with images and XML files, possibly in SET/"
    add("--voc_path", help=text)
    text = "folder with images/SET and labels/SET, or with images and text files, and with classes.txt or data.yaml"
    add("--yolo_path", help=text)
    splits = {"train": "training", "val": "validation"} if training else {"val": "validation"}
    none = "; none: train without one" if training else ""
    for kind, year in (("coco", "2017"), ("voc", ""), ("yolo", "")):
        for split, name in splits.items():
            text = f"name of the {name} set of {kind} data{none if split == 'val' else ''} {DEFAULT}"
            add(f"--{kind}_{split}_set", default=f"{split}{year}", help=text)
    for split, name in splits.items():
        text = f"CSV file of the {name} set: path,x1,y1,x2,y2,class_name, or columns that a header names"
        add(f"--csv_{split}", help=text)
    text = "CSV file of the classes: class_name,id (default: those of the training set, or of the model)"
    add("--csv_classes", help=text)
    text = "share of the images to validate on, such as 0.2, for a voc or yolo folder that is not divided into sets"
    add("--val_share", type=fraction, help=text)
    text = "read COCO's crowds as objects: some tools, such as CVAT, mark every mask as a crowd"
    add("--crowds_are_objects", action="store_true", help=text)
    for split, name in splits.items():
        number = {"train": 400, "val": 100}[split]
        add(f"--shapes_{split}", type=positive_int, default=number, help=f"number of {name} images {DEFAULT}")
    text = "values that become black and white in images of more than 8 bits (default: auto: those that the model was "
    text += "trained with, otherwise those that the files declare, otherwise those that the images hold)"
    add("--pixel_range", nargs="+", action=_PixelRange, metavar=("auto|LOW", "HIGH"), help=text)
    text = f"limit of the pixels of an image, in millions {DEFAULT}"
    add("--pixel_limit", type=positive_float, default=PIXEL_LIMIT, help=text)
    add("--skip_bad", action="store_true", help=SKIP_BAD)
    if training:
        add("--strict", action="store_true", help="treat warnings about the data as errors")


def add_anchor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that change the anchors."""
    group = parser.add_argument_group("anchors", "visualize --show anchor_fit finds those that fit your data")
    for flag, text in (
        ("--anchor_scales", "factors that multiply the sizes (default: 1 1.26 1.59)"),
        ("--anchor_ratios", "height / width (default: 0.5 1 2)"),
        ("--anchor_sizes", "sides on P3 to P7, pixels (default: 32 64 128 256 512)"),
    ):
        group.add_argument(flag, type=positive_float, nargs="+", help=text)


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that augment the training images."""
    add = parser.add_argument_group("augmentation").add_argument
    text = f"mirror the images in this direction half of the time {DEFAULT}"
    add("--flip", choices=[*FLIPS], default="horizontal", help=text)
    text = "turn the images by 0, 90, 180 or 270 degrees at random, as for views from above"
    add("--rotate90", action="store_true", help=text)
    text = "multiply --min_side and --max_side by a random factor in this range, such as 0.1 2.0, and crop or pad to "
    text += "a square of --max_side pixels (large-scale jitter)"
    add("--scale_jitter", type=positive_float, nargs=2, metavar=("LOW", "HIGH"), help=text)
    add("--jitter", type=positive_int, nargs=2, help="draw the short side from this range, pixels")
    add("--random_crop", type=fraction, help="crop to at least this share of each side")
    add("--colour_jitter", type=fraction, help="strength of random changes of colour, such as 0.4")


def add_tile_arguments(parser: argparse.ArgumentParser, training: bool, of_model: bool = True) -> None:
    """Add the flags of tiles; with `of_model`, their default is None, which stands for the model's values."""
    group, source = parser.add_argument_group("tiles of large images"), "the model's, or " if of_model else ""
    text = "process images larger than this, pixels, in tiles of this side at full resolution"
    if of_model:
        group.add_argument("--tile", type=non_negative_int, help=f"{text} (default: {source}none; 0: none)")
    else:
        text = f"train on random tiles of this side, and {text} (default: none)"
        group.add_argument("--tile", type=positive_int, help=text)
    text = "share of the side by which tiles overlap; it should be larger than the objects "
    text += f"(default: {source}{OVERLAP:g})"
    group.add_argument("--tile_overlap", type=fraction, default=None if of_model else OVERLAP, help=text)
    if training:
        text = f"share of the training tiles that are drawn anywhere, without a box if possible {DEFAULT}"
        group.add_argument("--tile_background", type=fraction, default=BACKGROUND, help=text)


def given_tiles(args: argparse.Namespace) -> dict[str, Any]:
    """The flags among --tile and --tile_overlap that are given."""
    return {name: getattr(args, name) for name in ("tile", "tile_overlap") if getattr(args, name) is not None}


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the device, the precision and the worker processes."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help=f"auto (a GPU if there is one), cpu, cuda:1, mps {DEFAULT}")
    text = "precision of the network's arithmetic; auto: bf16 if the device computes it natively, otherwise fp16 on "
    text += f"CUDA and fp32 elsewhere {DEFAULT}"
    group.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help=text)
    group.add_argument("--workers", type=non_negative_int, default=2, help=f"processes that read images {DEFAULT}")


def score_threshold(text: str) -> float | str:
    """Argparse type: `best`, or a fraction."""
    return text if text == "best" else fraction(text)


score_threshold.__name__ = "score"  # in argparse's message


def add_detection_arguments(parser: argparse.ArgumentParser, of_model: bool = True, best: bool = False) -> None:
    """Add the flags that limit detections; with `of_model` their default is None, with `best` a score may be `best`."""
    group, source = parser.add_argument_group("detection"), "the model's, or " if of_model else ""
    for name, kind, text in (
        ("score_threshold", score_threshold if best else fraction, "scores must be above it"),
        ("nms_threshold", fraction, "of two boxes of a class that overlap by more than this IoU, keep the better one"),
        ("top_k", positive_int, "candidates per pyramid level, before NMS"),
        ("max_detections", positive_int, "detections per image, and per class and image in COCO's numbers"),
    ):
        default = f"(default: {source}{LIMITS[name]:g})"
        if best and name == "score_threshold":
            text += "; best: each class's own score, that of the best F1 in validation"
            default = "(default: best if the model has these scores, otherwise 0.5)"
        group.add_argument(f"--{name}", type=kind, default=None if of_model else LIMITS[name], help=f"{text} {default}")


def given_limits(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_detection_arguments` that are given."""
    return {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}


def check_data_arguments(args: argparse.Namespace, needed: list[str]) -> list[str]:
    """A message for each data flag that is missing or misplaced; `needed` are the CSV flags that the command needs."""
    kind = args.dataset
    needs = [f"{kind}_path"] if kind in FOLDERS else needed if kind == "csv" else []
    errors = [f"--dataset {kind} needs --{flag}" for flag in needs if getattr(args, flag) is None]
    if args.val_share is not None and args.dataset not in ("voc", "yolo"):
        errors.append(f"--val_share divides folders of voc and yolo data, not {args.dataset}")
    if args.crowds_are_objects and args.dataset != "coco":
        errors.append("--crowds_are_objects is for coco data")
    for split in ("train", "val"):
        if f"csv_{split}" in needed and getattr(args, f"{kind}_{split}_set", None) == "none":
            errors.append(f"--{kind}_{split}_set none leaves no data")
    return errors


def make_dataset(
    args: argparse.Namespace,
    split: str,
    transform: Callable[[dict], dict] | None,
    class_names: Sequence[str] | None = None,
    report: Report | None = None,
) -> DetectionDataset | None:
    """The data set that the flags name for a split, train or val; None if they name none. `report` collects its errors.

    CSV data without a class list gets the `class_names` of a model, if they are given.
    """
    report, kind, dataset = report or Report(skip_bad=args.skip_bad), args.dataset, None
    if kind in FOLDERS:
        path, set_name = getattr(args, f"{kind}_path"), getattr(args, f"{kind}_{split}_set")
        options = {"crowds_are_objects": args.crowds_are_objects} if kind == "coco" else {"val_share": args.val_share}
        if set_name != "none":
            dataset = FOLDERS[kind](path, set_name, transform, report=report, **options)
    elif kind == "csv":
        if class_names == placeholder_names(len(class_names or ())):
            class_names = None
        if path := getattr(args, f"csv_{split}"):
            train_path = getattr(args, "csv_train", None)
            if split == "val" and train_path and not (args.csv_classes or class_names):
                class_names = read_table(Path(train_path), Report()).class_names()
            dataset = CSVDataset(path, args.csv_classes, transform, class_names, report)
    else:
        from retinanet.data.shapes import ShapesDataset  # scikit-image takes long to import

        # Training images have odd seeds, so that the validation images, of seed 0, are never among them.
        seed = 2 * args.seed + 1 if split == "train" else 0
        dataset = ShapesDataset(getattr(args, f"shapes_{split}"), seed, transform=transform)
    if dataset is not None:
        dataset.pixel_range, dataset.pixel_limit = args.pixel_range, args.pixel_limit
        if args.skip_bad:
            leave_out_bad_images(dataset, args.workers)
    return dataset
