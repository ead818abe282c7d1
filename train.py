"""Train a RetinaNet on COCO, CSV, Pascal VOC, YOLO or generated data, in one process or in many under torchrun."""

import argparse
import sys
from pathlib import Path

from retinanet import process
from retinanet.commands import flags
from retinanet.commands.next_steps import next_steps
from retinanet.model import ARCHITECTURES
from retinanet.process import log, script
from retinanet.running import run_training
from retinanet.training.recipes import RECIPES
from retinanet.training.settings import Settings, contradictions, parse_interval


def interval(text: str) -> tuple[int, str]:
    """Argparse type: `500` for optimizer steps, or `10m` for minutes."""
    try:
        return parse_interval(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def make_parser() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = flags.make_parser(__doc__)
    flags.add_data_arguments(parser, training=True)
    add = parser.add_argument_group("model").add_argument
    count, rate = flags.positive_int, flags.positive_float
    add("--depth", type=count, choices=sorted(ARCHITECTURES), help=f"layers of the ResNet {flags.DEFAULT}")
    text = "imagenet, imagenet_v2, coco (for depth 50), none (random), or a checkpoint, with classes matched by name"
    add("--weights", help=f"{text} (default: the recipe's; modern imagenet_v2, scratch none, others imagenet)")
    flags.add_anchor_arguments(parser)
    add = parser.add_argument_group("training").add_argument
    text = "how to train, and the defaults of other flags: original, paper (as its authors) and modern (the best "
    text += "published for photographs) start from ImageNet weights, scratch from random weights"
    add("--recipe", choices=sorted(RECIPES), help=f"{text} {flags.DEFAULT}")
    add("--epochs", type=count, help="passes over the training set (default: the recipe's; modern 12, others 100)")
    add("--batch_size", type=count, help=f"images per batch and process {flags.DEFAULT}")
    add("--accumulate", type=count, help=f"batches averaged for one optimizer step {flags.DEFAULT}")
    add("--lr", type=rate, help="peak learning rate (default: the recipe's, in proportion to the global batch)")
    add("--backbone_lr", type=rate, help=f"learning rate of the backbone, as a multiple of --lr {flags.DEFAULT}")
    text = "number of the backbone's stages that are not trained: 1 is conv1, 2 adds the first residual stage, ... "
    text += "(default: the recipe's; paper and modern 2, others 0)"
    add("--freeze_stages", type=flags.non_negative_int, choices=range(5), help=text)
    add("--clip_norm", type=rate, help="limit of the gradient's norm (default: the recipe's)")
    text = "average the weights with this decay, such as 0.999, and save the average; 0: no average"
    add("--ema", type=flags.fraction, help=f"{text} (default: the recipe's; modern 0.9998, others 0)")
    add("--early_stop", type=count, help="stop after this many validations without a better AP")
    text = "repeat images of classes that are in less than this share of the images, such as 0.01"
    add("--balance", type=rate, help=f"{text} (repeat-factor sampling)")
    add("--seed", type=flags.non_negative_int, help=f"seed of weights, order and augmentation {flags.DEFAULT}")
    add = parser.add_argument_group("images").add_argument
    text = "pixels of the resized short side (default: the recipe's; modern 800, others 608)"
    add("--min_side", type=count, help=text)
    text = "limit of the resized long side, pixels (default: the recipe's; modern 1333, others 1024)"
    add("--max_side", type=count, help=text)
    flags.add_tile_arguments(parser, training=True, of_model=False)
    flags.add_augmentation_arguments(parser)
    flags.add_detection_arguments(parser, of_model=False)
    flags.add_machine_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out_dir", help=f"folder for checkpoints and logs {flags.DEFAULT}")
    add("--resume", help="continue a run: auto (from last.pt of --out_dir, if it exists), or the path of a last.pt")
    add("--checkpoint_every", type=interval, help=f"steps (500) or minutes (10m) between checkpoints {flags.DEFAULT}")
    add("--val_every", type=count, help=f"epochs from one validation to the next {flags.DEFAULT}")
    add("--log_every", type=count, help=f"optimizer steps between lines of log.jsonl {flags.DEFAULT}")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard as well")
    parser.set_defaults(**Settings.defaults())
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; a usage error lists all contradictions and exits with 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_train"])
    has_val_set = getattr(args, f"{args.dataset}_val_set", None) != "none"
    if args.dataset == "csv":
        has_val_set = bool(args.csv_val)
    errors += contradictions(vars(args), has_val_set)
    if errors:
        parser.error("; ".join(errors))
    return args


@script
def main(argv: list[str] | None = None) -> None:
    """Train as the flags say."""
    args = parse_arguments(argv)
    device = process.choose_device(args.device)
    process.init_distributed(device)
    process.setup_logging()
    settings = Settings.resolve(vars(args), device)
    train_set, val_set = (flags.make_dataset(args, split, None) for split in ("train", "val"))
    run_training(settings, device, train_set, val_set)
    best = Path(settings.out_dir) / "best.pt"
    log.info("%s", next_steps(args, best.parent, best if best.is_file() else None, train_set.image_path(0)))


if __name__ == "__main__":
    sys.exit(main())
