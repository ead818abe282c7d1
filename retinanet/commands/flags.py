"""What the three scripts share: the flags that name the data, their checks, and the data sets that they mean."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from torchvision.transforms import Compose

from retinanet.anchors import Anchors
from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.data.transforms import Augmenter, ColourJitter, RandomCrop, Resizer, ScaleJitter
from retinanet.data.voc import VOCDataset
from retinanet.data.yolo import YoloDataset
from retinanet.errors import UserError, shown, suggestion

NEEDED_FLAGS = {
    "coco": ["coco_path"],
    "csv": ["csv_classes"],
    "shapes": [],
    "voc": ["voc_path"],
    "yolo": ["yolo_path"],
}
FOLDERS = {"coco": CocoDataset, "voc": VOCDataset, "yolo": YoloDataset}  # data that are a folder and a set's name


def _number(read: type, kind: str, is_right: Callable[[Any], bool], rule: str) -> Callable[[str], Any]:
    """Argparse type: what `read` makes of a text, if that is right; whole numbers must fit 64 bits."""

    def convert(text: str) -> Any:
        try:
            value = read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be a {kind}, not {shown(text)}") from error
        if not is_right(value):
            raise argparse.ArgumentTypeError(f"must be {rule}, not {text if len(text) < 30 else shown(text)}")
        if read is int and value >= 2**63:
            raise argparse.ArgumentTypeError(f"must be below 2 to the 63rd, not {shown(text)}")
        return value

    return convert


positive_int = _number(int, "whole number", lambda value: value >= 1, "at least 1")
non_negative_int = _number(int, "whole number", lambda value: value >= 0, "at least 0")
positive_float = _number(float, "number", lambda value: 0 < value < math.inf, "above 0 and finite")
fraction = _number(float, "number", lambda value: 0 <= value <= 1, "from 0 to 1")


class Parser(argparse.ArgumentParser):
    """Argparse's, but it names all mistakes in one message, and what a misspelt flag or value may have meant."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._mistakes: list[str] = []

    def _get_values(self, action: argparse.Action, texts: list[str]) -> Any:
        try:
            return super()._get_values(action, texts)
        except argparse.ArgumentError as error:
            near = [suggestion(text, map(str, action.choices or ())) for text in texts]
            self._mistakes.append(str(error) + next(filter(None, near), ""))
            return action.default

    def parse_args(self, args: list[str] | None = None, namespace: argparse.Namespace | None = None) -> Any:
        """Flags -> values; the status of a mistake is 2."""
        self._mistakes = []
        values, unknown = self.parse_known_args(args, namespace)
        flags = [text.split("=")[0] for text in unknown if text.startswith("-")]
        for flag in flags:
            self._mistakes.append(f"there is no flag {flag}{suggestion(flag, self._option_string_actions)}")
        if unknown and not flags:
            self._mistakes.append(f"no flag takes {', '.join(map(shown, unknown))}")
        if self._mistakes:
            super().error("; ".join(self._mistakes))
        return values

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and the message, after those of the values that were found wrong before it."""
        super().error("; ".join([*self._mistakes, message]))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default, save that of a flag that is off, or whose help says what happens without it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def make_parser(description: str) -> Parser:
    """A parser whose help shows every default."""
    return Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def add_data_arguments(parser: argparse.ArgumentParser, training: bool, required: bool = True) -> None:
    """Flags that say what the data are, with or without those of the training set."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=sorted(NEEDED_FLAGS), required=required, help="kind of data")
    group.add_argument("--coco_path", help="folder with annotations/instances_SET.json and images/SET/")
    if training:
        group.add_argument("--coco_train_set", default="train2017", help="name of COCO's training set")
        group.add_argument("--csv_train", help="CSV file: path,x1,y1,x2,y2,class_name")
    none = "; none: train without" if training else ""
    group.add_argument("--coco_val_set", default="val2017", help=f"name of COCO's validation set{none}")
    group.add_argument("--csv_val", help="CSV file of the validation set")
    group.add_argument("--csv_classes", help="CSV file: class_name,id")
    group.add_argument("--voc_path", help="folder with Annotations, JPEGImages and ImageSets/Main")
    group.add_argument("--yolo_path", help="folder with images/SET, labels/SET and classes.txt or data.yaml")
    for kind in ("voc", "yolo"):
        if training:
            group.add_argument(f"--{kind}_train_set", default="train", help=f"name of the training set of {kind} data")
        group.add_argument(f"--{kind}_val_set", default="val", help=f"name of the validation set of {kind} data{none}")
    if training:
        group.add_argument("--shapes_train", type=positive_int, default=400, help="pictures of shapes to train on")
    group.add_argument("--shapes_val", type=positive_int, default=100, help="pictures of shapes to validate on")
    if training:
        group.add_argument(
            "--strict", action="store_true", help="stop at what is otherwise dropped, clipped or warned of"
        )


def add_anchor_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that change the anchors."""
    group = parser.add_argument_group("anchors (visualize.py --show anchor_fit finds those that fit your data)")
    group.add_argument(
        "--anchor_scales", type=positive_float, nargs="+", help="factors on the sizes (default: 1 1.26 1.59)"
    )
    group.add_argument("--anchor_ratios", type=positive_float, nargs="+", help="height / width (default: 0.5 1 2)")
    group.add_argument(
        "--anchor_sizes",
        type=positive_float,
        nargs="+",
        help="side on each of P3 to P7, pixels (default: 32 64 128 256 512)",
    )


def anchors_from_arguments(args: argparse.Namespace) -> Anchors:
    """The anchors that the flags mean; the paper's where they say nothing.

    Raises:
        UserError: the flags contradict each other.
    """
    try:
        return Anchors(sizes=args.anchor_sizes, ratios=args.anchor_ratios, scales=args.anchor_scales)
    except ValueError as error:
        raise UserError(f"--anchor_sizes, --anchor_scales, --anchor_ratios: {error}") from error


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how training changes its pictures, beside mirroring them."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--jitter", type=positive_int, nargs=2, help="train with short sides drawn from this range, pixels"
    )
    group.add_argument("--random_crop", type=fraction, help="cut out parts of at least this share of each side")
    group.add_argument("--colour_jitter", type=fraction, help="strength of random changes of colour, such as 0.4")


def training_transform(args: argparse.Namespace) -> Callable[[dict], dict]:
    """What a sample of the training set goes through."""
    steps = [RandomCrop(args.random_crop)] if args.random_crop is not None else []
    steps += [ColourJitter(args.colour_jitter)] if args.colour_jitter is not None else []
    resizer = ScaleJitter(*args.jitter, args.max_side) if args.jitter else Resizer(args.min_side, args.max_side)
    return Compose([*steps, Augmenter(), resizer])


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say what to compute with."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    group.add_argument(
        "--precision",
        choices=["auto", "fp32", "bf16"],
        default="auto",
        help="of the network's arithmetic; auto is bf16 where the device has it natively",
    )
    group.add_argument("--workers", type=non_negative_int, default=2, help="processes that read pictures")


def add_detection_arguments(parser: argparse.ArgumentParser, score_threshold: float) -> None:
    """Flags that say which detections count."""
    group = parser.add_argument_group("detection")
    group.add_argument("--score_threshold", type=fraction, default=score_threshold, help="scores must be above it")
    group.add_argument("--max_detections", type=positive_int, default=100, help="detections an image")
    group.add_argument("--batch_size", type=positive_int, default=4, help="images a batch")


def check_data_arguments(args: argparse.Namespace, needed: list[str]) -> list[str]:
    """What is missing among the data flags: one message each.

    Args:
        args: the parsed flags.
        needed: flags of CSV data that this script needs beside `--csv_classes`.
    """
    flags = NEEDED_FLAGS[args.dataset] + (needed if args.dataset == "csv" else [])
    errors = [f"--dataset {args.dataset} needs --{flag}" for flag in flags if getattr(args, flag) is None]
    for split in ("train", "val"):
        if f"csv_{split}" in needed and getattr(args, f"{args.dataset}_{split}_set", None) == "none":
            errors.append(f"--{args.dataset}_{split}_set none leaves no data")
    return errors


def make_dataset(
    args: argparse.Namespace, split: str, transform: Callable[[dict], dict] | None
) -> DetectionDataset | None:
    """The data set that the flags name; None where they name none.

    Args:
        args: the parsed flags.
        split: train or val.
        transform: what its samples go through.
    """
    kind = args.dataset
    if kind in FOLDERS:
        set_name = getattr(args, f"{kind}_{split}_set")
        return None if set_name == "none" else FOLDERS[kind](getattr(args, f"{kind}_path"), set_name, transform)
    if kind == "csv":
        path = getattr(args, f"csv_{split}")
        return CSVDataset(path, args.csv_classes, transform) if path else None
    from retinanet.data.shapes import ShapesDataset

    # Training draws from odd seeds alone: the validation pictures, of seed 0, are never trained on.
    seed = 2 * args.seed + 1 if split == "train" else 0
    return ShapesDataset(getattr(args, f"shapes_{split}"), seed, transform=transform)


def make_out_dir(path: str) -> Path:
    """Create the folder for a run's files.

    Raises:
        UserError: it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {path}: {error.strerror}") from error
    return folder
