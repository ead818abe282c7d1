"""Train a RetinaNet on COCO, CSV or embedded data."""

import argparse
import json
import sys

import torch
import torchvision

from retinanet import __version__, checkpoint, coco_eval, engine
from retinanet.anchors import Anchors
from retinanet.cli import (
    add_data_arguments,
    add_machine_arguments,
    check_data_arguments,
    make_out_dir,
    make_parser,
    positive_float,
    positive_int,
    training_dataset,
    validation_dataset,
)
from retinanet.dataloader import AspectRatioBasedSampler, Augmenter, Resizer, make_loader
from retinanet.losses import FocalLoss
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.optim import RECIPES, Recipe, Schedule, make_optimizer
from retinanet.utils import (
    UserError,
    choose_device,
    choose_precision,
    log,
    script,
    seed_everything,
    setup_logging,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error lists all contradictions and exits with 2."""
    parser = make_parser(__doc__)
    add_data_arguments(parser, training=True)
    group = parser.add_argument_group("model")
    group.add_argument("--depth", type=int, choices=sorted(ARCHITECTURES), default=50, help="layers of the ResNet")
    group.add_argument("--weights", default="imagenet", help="start from: imagenet, none (random), or a checkpoint")
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=sorted(RECIPES), default="original", help="optimizer and schedule")
    group.add_argument("--epochs", type=positive_int, default=100, help="passes over the training set")
    group.add_argument("--batch_size", type=positive_int, default=2, help="images a step")
    group.add_argument("--accumulate", type=positive_int, default=1, help="batches averaged for one optimizer step")
    group.add_argument("--lr", type=positive_float, help="peak learning rate (default: the recipe's, scaled)")
    group.add_argument("--min_side", type=positive_int, default=608, help="pixels of the resized short side")
    group.add_argument("--max_side", type=positive_int, default=1024, help="limit of the resized long side, pixels")
    group.add_argument("--seed", type=int, default=0, help="decides weights, order and augmentation")
    add_machine_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out_dir", default="runs/train", help="folder for checkpoints and logs")
    group.add_argument("--val_every", type=positive_int, default=1, help="validate after every so many epochs")
    group.add_argument("--log_every", type=positive_int, default=20, help="steps between lines of log.jsonl")
    args = parser.parse_args(argv)
    errors = check_data_arguments(args, ["csv_train"])
    if args.max_side < args.min_side:
        errors.append(f"--max_side {args.max_side} is below --min_side {args.min_side}")
    if errors:
        parser.error("; ".join(errors))
    return args


def make_model(args: argparse.Namespace, num_classes: int, recipe: Recipe, device: torch.device) -> RetinaNet:
    """The model that training starts from."""
    criterion = FocalLoss(best_match_iou=recipe.best_match_iou)
    try:
        net = resnet(args.depth, num_classes, args.weights == "imagenet", Anchors(), criterion)
    except RuntimeError as error:
        raise UserError(str(error)) from error
    net.freeze_bn(not recipe.train_bn)
    return net.to(device, memory_format=torch.channels_last)


@script
def main(argv: list[str] | None = None) -> None:
    """Train as the flags say."""
    args = parse_arguments(argv)
    setup_logging()
    recipe = RECIPES[args.recipe]
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    seed_everything(args.seed)

    resizer = Resizer(args.min_side, args.max_side)
    train_set = training_dataset(args, lambda sample: resizer(Augmenter()(sample)))
    val_set = validation_dataset(args, resizer)
    sampler = AspectRatioBasedSampler(train_set, args.batch_size, seed=args.seed)
    train_loader = make_loader(train_set, args.batch_size, args.workers, sampler)
    val_loader = make_loader(val_set, args.batch_size, args.workers) if val_set else None
    class_names = list(train_set.labels.values())

    net = make_model(args, len(class_names), recipe, device)
    global_batch = args.batch_size * args.accumulate
    lr = args.lr or recipe.lr * global_batch / recipe.reference_batch
    optimizer = make_optimizer(net, recipe, lr)
    schedule = Schedule(optimizer, recipe, args.epochs * -(-len(train_loader) // args.accumulate))

    log.info(
        "%s: %d images, %d boxes, %d classes | ResNet-%d, %.1f M parameters, weights: %s | %s, %s | recipe %s, "
        "learning rate %.2g, global batch %d, %d epochs | retinanet %s, torch %s, torchvision %s",
        args.dataset, len(train_set), len(train_set.rows), len(class_names),
        args.depth, sum(weight.numel() for weight in net.parameters()) / 1e6, args.weights,
        device, str(precision).removeprefix("torch."), args.recipe, lr, global_batch, args.epochs,
        __version__, torch.__version__, torchvision.__version__,
    )  # fmt: skip
    if args.weights == "none" and args.recipe != "scratch":
        log.warning("warning: recipe %s does not learn from random weights; use --recipe scratch", args.recipe)

    out_dir = make_out_dir(args.out_dir)
    (out_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
    with open(out_dir / "log.jsonl", "w", buffering=1) as log_file:

        def log_entry(entry: dict) -> None:
            log_file.write(json.dumps(entry) + "\n")

        best = -1.0
        for epoch in range(args.epochs):
            stats = engine.train_one_epoch(
                net, train_loader, optimizer, schedule, device, precision, epoch,
                recipe.clip_norm, args.accumulate, log_step=log_entry, log_every=args.log_every,
            )  # fmt: skip
            schedule.end_epoch(stats["loss"])
            log.info(
                "epoch %d: class loss %.3f, box loss %.3f, %.1f images/s",
                epoch, stats["class_loss"], stats["box_loss"], stats["images_per_second"],
            )  # fmt: skip
            metrics = {}
            if val_loader and ((epoch + 1) % args.val_every == 0 or epoch + 1 == args.epochs):
                found = engine.detect(net, val_loader, device, precision)
                results = coco_eval.coco_results(val_set, found)
                metrics = coco_eval.score(coco_eval.ground_truth(val_set), results, val_set.image_ids)
                log.info("%s", coco_eval.metrics_table(metrics))
            log_entry({"epoch": epoch, **stats, **metrics})
            content = checkpoint.model_entries(net, class_names, args.min_side, args.max_side)
            content |= {"epoch": epoch, "metrics": metrics}
            checkpoint.save(out_dir / "last.pt", content)
            if metrics.get("AP", -1.0) > best:
                best = metrics["AP"]
                checkpoint.save(out_dir / "best.pt", content)


if __name__ == "__main__":
    sys.exit(main())
