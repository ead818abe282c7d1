"""What the three scripts share: the flags that name the data, their checks, and the data sets that they mean."""

import argparse
from collections.abc import Callable
from pathlib import Path

from retinanet.datasets import CocoDataset, CSVDataset, DetectionDataset
from retinanet.utils import UserError

SHAPES_VAL_SEED = 1_000_000  # far from any training seed: the validation pictures are never trained on

NEEDED_FLAGS = {"coco": ["coco_path"], "csv": ["csv_classes"], "shapes": []}


def positive_int(text: str) -> int:
    """Argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def non_negative_int(text: str) -> int:
    """Argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def positive_float(text: str) -> float:
    """Argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def fraction(text: str) -> float:
    """Argparse type: a number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser whose help shows every default."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )


def add_data_arguments(parser: argparse.ArgumentParser, training: bool) -> None:
    """Flags that say what the data are, with or without those of the training set."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=sorted(NEEDED_FLAGS), required=True, help="kind of data")
    group.add_argument("--coco_path", help="folder with annotations/instances_SET.json and images/SET/")
    if training:
        group.add_argument("--coco_train_set", default="train2017", help="name of COCO's training set")
        group.add_argument("--csv_train", help="CSV file: path,x1,y1,x2,y2,class_name")
    group.add_argument("--coco_val_set", default="val2017", help="name of COCO's validation set")
    group.add_argument("--csv_val", help="CSV file of the validation set")
    group.add_argument("--csv_classes", help="CSV file: class_name,id")
    if training:
        group.add_argument("--shapes_train", type=positive_int, default=400, help="pictures of shapes to train on")
    group.add_argument("--shapes_val", type=positive_int, default=100, help="pictures of shapes to validate on")


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
    return [f"--dataset {args.dataset} needs --{flag}" for flag in flags if getattr(args, flag) is None]


def validation_dataset(args: argparse.Namespace, transform: Callable[[dict], dict]) -> DetectionDataset | None:
    """The validation set that the flags name; None where they name none."""
    if args.dataset == "coco":
        return CocoDataset(args.coco_path, args.coco_val_set, transform)
    if args.dataset == "csv":
        return CSVDataset(args.csv_val, args.csv_classes, transform) if args.csv_val else None
    return _shapes(args.shapes_val, SHAPES_VAL_SEED, transform)


def training_dataset(args: argparse.Namespace, transform: Callable[[dict], dict]) -> DetectionDataset:
    """The training set that the flags name."""
    if args.dataset == "coco":
        return CocoDataset(args.coco_path, args.coco_train_set, transform)
    if args.dataset == "csv":
        return CSVDataset(args.csv_train, args.csv_classes, transform)
    return _shapes(args.shapes_train, args.seed, transform)


def _shapes(num_images: int, seed: int, transform: Callable[[dict], dict]) -> DetectionDataset:
    from retinanet.shapes import ShapesDataset  # scikit-image is slow to import, and only this needs it

    return ShapesDataset(num_images, seed, transform=transform)


def check_classes(model_path: str, class_names: list[str], dataset: DetectionDataset) -> None:
    """Make sure that a model and a data set speak of the same classes.

    Raises:
        UserError: they do not; the message shows both.
    """
    names = list(dataset.labels.values())
    if names != class_names:
        raise UserError(f"{model_path} knows the classes {class_names}, but the data have {names}")


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
