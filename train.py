"""Train a RetinaNet on COCO, CSV or embedded data; in one process, or in many under torchrun."""

import argparse
import json
import re
import sys
import time
from pathlib import Path

import torch
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from retinanet import __version__, inference, process
from retinanet.commands import flags
from retinanet.data.checks import check_before_training
from retinanet.data.dataset import DetectionDataset, check_classes
from retinanet.data.loader import WorkerDiedError, make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Resizer
from retinanet.errors import UserError
from retinanet.evaluation import coco as coco_eval
from retinanet.losses import FocalLoss
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.process import log, script
from retinanet.training import checkpoint, engine
from retinanet.training.engine import Progress
from retinanet.training.recipes import EMA, RECIPES, Recipe, Schedule, make_optimizer
from retinanet.training.run import Run, RunLog, check_resume, find_checkpoint
from retinanet.visual import anchor_fit, views

# What --weights may name in place of a file.
PRETRAINED = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2", "none": False}


def interval(text: str) -> tuple[int, str]:
    """Argparse type: `500` for optimizer steps, or `10m` for minutes."""
    found = re.fullmatch(r"(\d+)(m?)", text)
    if not found or int(found[1]) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of steps, such as 500, or minutes, such as 10m, not {text}")
    return int(found[1]), "minutes" if found[2] else "steps"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error lists all contradictions and exits with 2."""
    parser = flags.make_parser(__doc__)
    flags.add_data_arguments(parser, training=True)
    group = parser.add_argument_group("model")
    group.add_argument("--depth", type=int, choices=sorted(ARCHITECTURES), default=50, help="layers of the ResNet")
    group.add_argument(
        "--weights", default="imagenet", help="start from: imagenet, imagenet_v2, none (random), or a checkpoint's path"
    )
    flags.add_anchor_arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=sorted(RECIPES), default="original", help="optimizer and schedule")
    group.add_argument("--epochs", type=flags.positive_int, default=100, help="passes over the training set")
    group.add_argument("--batch_size", type=flags.positive_int, default=2, help="images a batch, of each process")
    group.add_argument(
        "--accumulate", type=flags.positive_int, default=1, help="batches averaged for one optimizer step"
    )
    group.add_argument("--lr", type=flags.positive_float, help="peak learning rate (default: the recipe's, scaled)")
    group.add_argument(
        "--clip_norm", type=flags.positive_float, help="limit of the gradient's norm (default: the recipe's)"
    )
    group.add_argument(
        "--ema", type=flags.fraction, help="decay of averaged weights, such as 0.999; they are what is saved"
    )
    group.add_argument(
        "--early_stop", type=flags.positive_int, help="stop after so many validations without a better AP"
    )
    group.add_argument("--seed", type=flags.non_negative_int, default=0, help="decides weights, order and augmentation")
    group = parser.add_argument_group("pictures")
    group.add_argument("--min_side", type=flags.positive_int, default=608, help="pixels of the resized short side")
    group.add_argument(
        "--max_side", type=flags.positive_int, default=1024, help="limit of the resized long side, pixels"
    )
    flags.add_augmentation_arguments(parser)
    flags.add_machine_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out_dir", default="runs/train", help="folder for checkpoints and logs")
    group.add_argument("--resume", help="go on with a run: auto (last.pt of --out_dir, if it is there), or a last.pt")
    group.add_argument("--checkpoint_every", type=interval, default="10m", help="steps (500) or minutes (10m)")
    group.add_argument("--val_every", type=flags.positive_int, default=1, help="validate after every so many epochs")
    group.add_argument(
        "--log_every", type=flags.positive_int, default=20, help="optimizer steps between lines of log.jsonl"
    )
    group.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard as well")
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_train"])
    if args.max_side < args.min_side:
        errors.append(f"--max_side {args.max_side} is below --min_side {args.min_side}")
    if args.jitter and not args.jitter[0] <= args.jitter[1] <= args.max_side:
        errors.append(f"--jitter {args.jitter[0]} {args.jitter[1]} must rise, and end at --max_side {args.max_side}")
    no_validation = (
        args.csv_val is None if args.dataset == "csv" else vars(args).get(f"{args.dataset}_val_set") == "none"
    )
    if args.early_stop and no_validation:
        errors.append("--early_stop needs a validation set")
    if args.ema == 1:
        errors.append("--ema 1 would never change the weights")
    if errors:
        parser.error("; ".join(errors))
    return args


def make_model(args: argparse.Namespace, num_classes: int) -> RetinaNet:
    """The model that training starts from."""
    try:
        net = resnet(args.depth, num_classes, PRETRAINED.get(args.weights, False), flags.anchors_from_arguments(args))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    if args.weights not in PRETRAINED:
        log.info("%s", checkpoint.load_weights(net, args.weights))
    return net


def make_run(args: argparse.Namespace, recipe: Recipe, device: torch.device, train_set: DetectionDataset) -> Run:
    """A run at its beginning, or where the checkpoint that it resumes left off."""
    path = find_checkpoint(args)
    state = None
    if path is None:
        net = make_model(args, train_set.num_classes())
    else:
        net, info = checkpoint.load_model(path)
        check_resume(path, args, info, train_set)
        state = info["training"]
    net.focalLoss = FocalLoss(best_match_iou=recipe.best_match_iou)
    net.train()
    net.freeze_bn(not recipe.train_bn)
    net.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, recipe, args.lr)
    steps_per_epoch = -(-len(train_set) // args.global_batch)
    ema = EMA(net, args.ema) if args.ema is not None else None
    schedule = Schedule(optimizer, recipe, args.epochs * steps_per_epoch)
    class_names = list(train_set.labels.values())
    run = Run(args, net, ema, optimizer, schedule, class_names, len(train_set))
    if state:
        run.restore(info)
        log.info("going on with %s in epoch %d, after step %d", path, *run.position)
    if process.is_main_process():
        run.log = RunLog(args.out_dir, path, state["log_size"] if state else 0, args.tensorboard, steps_per_epoch)
    return run


def log_header(args: argparse.Namespace, recipe: Recipe, run: Run, device: torch.device, num_boxes: int) -> None:
    """Say in one line what is trained, on what, and how."""
    precision = process.choose_precision(args.precision, device)
    log.info(
        "%s: %d images, %d boxes, %d classes | ResNet-%d, %.1f M parameters, weights: %s | %s, %s | recipe %s, "
        "learning rate %.3g (%.3g for %d images), global batch %d = %d images x %d batches x %d processes, %d epochs%s "
        "| retinanet %s, torch %s, torchvision %s",
        args.dataset, run.num_images, num_boxes, len(run.class_names),
        args.depth, sum(weight.numel() for weight in run.net.parameters()) / 1e6, args.weights,
        device, str(precision).removeprefix("torch."), args.recipe, args.lr, recipe.lr, recipe.reference_batch,
        args.global_batch, args.batch_size, args.accumulate, process.get_world_size(), args.epochs,
        "" if args.ema is None else f", EMA {args.ema}", __version__, torch.__version__, torchvision.__version__,
    )  # fmt: skip
    if args.weights == "none" and args.recipe != "scratch":
        log.warning("warning: recipe %s does not learn from random weights; use --recipe scratch", args.recipe)


def validate(
    run: Run, loader: DataLoader, dataset: DetectionDataset, device: torch.device, stop: process.StopSignals
) -> dict:
    """COCO's numbers of the detector, computed by all ranks together."""
    process.broadcast_buffers(run.detector)  # each rank has BatchNorm statistics of its own
    precision = process.choose_precision(run.args.precision, device)
    with process.seeded(run.args.seed):  # what a loader draws here must not change the training
        found = inference.detect(run.detector, loader, device, precision, stop=lambda: bool(stop.signum))
    signum = max(process.gather_objects(stop.signum))
    if signum:
        run.stop(signum)
    metrics = None
    if process.is_main_process():
        results = coco_eval.coco_results(dataset, found)
        metrics = coco_eval.score(coco_eval.ground_truth(dataset), results, dataset.image_ids).metrics
        log.info("%s", coco_eval.metrics_table(metrics))
        views.save_detections(dataset, found, Path(run.args.out_dir) / "detections.png")
    return process.from_main_process(metrics)


def train(
    run: Run,
    train_loader: DataLoader,
    sampler: AspectRatioBasedSampler,
    val_loader: DataLoader | None,
    val_set: DetectionDataset | None,
    device: torch.device,
    stop: process.StopSignals,
) -> None:
    """Train and validate, epoch by epoch, until the run is over or a signal comes."""
    args, recipe = run.args, RECIPES[run.args.recipe]
    model = run.net
    if process.get_world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(run.net, device_ids=devices, gradient_as_bucket_view=True)
    number, unit = args.checkpoint_every

    def after_step(signum: int) -> None:
        if run.ema:
            run.ema.update(run.net)
        if signum:
            run.stop(signum)
        if run.progress.step % number == 0 if unit == "steps" else time.monotonic() - run.saved_at > 60 * number:
            run.save_last()

    while run.progress.epoch < args.epochs and not (args.early_stop and run.stale >= args.early_stop):
        epoch = run.progress.epoch
        sampler.set_epoch(*run.position)
        stats = engine.train_one_epoch(
            model, train_loader, run.optimizer, run.schedule, device, process.choose_precision(args.precision, device),
            run.progress, args.clip_norm or recipe.clip_norm, args.accumulate, wish=lambda: stop.signum,
            after_step=after_step, log_step=run.log.write if run.log else None, log_every=args.log_every,
        )  # fmt: skip
        log.info(
            "epoch %d: class loss %.3f, box loss %.3f, %.1f images/s",
            epoch, stats["class_loss"], stats["box_loss"], stats["images_per_second"],
        )  # fmt: skip
        is_last = epoch + 1 == args.epochs
        run.metrics = {}
        if val_loader is not None and ((epoch + 1) % args.val_every == 0 or is_last):
            run.metrics = validate(run, val_loader, val_set, device, stop)
        with process.undisturbed():
            run.schedule.end_epoch(stats["loss"])
            run.progress = Progress(epoch + 1)
            if run.log:
                run.log.write({"epoch": epoch, **stats, **run.metrics})
            if run.metrics:
                run.stale += 1
                if run.metrics["AP"] > run.best:
                    run.best, run.stale = run.metrics["AP"], 0
                    run.save("best.pt")
            run.save_last()
        if run.log and (run.metrics or is_last):
            run.log.draw()
    log.info("done after %d epochs%s", run.progress.epoch, f", best AP {run.best:.3f}" if run.best >= 0 else "")


@script
def main(argv: list[str] | None = None) -> int:
    """Train as the flags say."""
    args = parse_arguments(argv)
    recipe = RECIPES[args.recipe]
    device = process.choose_device(args.device)
    process.init_distributed(device)
    process.setup_logging()
    args.precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}[process.choose_precision(args.precision, device)]
    args.global_batch = args.batch_size * args.accumulate * process.get_world_size()
    args.lr = args.lr or recipe.lr * args.global_batch / recipe.reference_batch
    process.seed_everything(args.seed)

    train_set = flags.make_dataset(args, "train", flags.training_transform(args))
    val_set = flags.make_dataset(args, "val", Resizer(args.min_side, args.max_side))
    if val_set:
        check_classes(train_set.source, list(train_set.labels.values()), val_set)
    check_before_training(train_set, val_set, args.strict)
    sampler = AspectRatioBasedSampler(
        train_set, args.batch_size, False, args.seed, process.get_rank(), process.get_world_size(), args.accumulate
    )
    train_loader = make_loader(train_set, args.batch_size, args.workers, sampler, device=device)
    val_loader = make_loader(val_set, args.batch_size, args.workers, device=device) if val_set else None

    out_dir = flags.make_out_dir(args.out_dir)
    run = make_run(args, recipe, device, train_set)
    log_header(args, recipe, run, device, len(train_set.annotations))
    if process.is_main_process():
        (out_dir / "args.json").write_text(json.dumps(vars(args), indent=2))
        anchor_fit.log_summary(train_set, run.net.anchors, args.min_side, args.max_side, recipe.best_match_iou)
        views.save_data_images(train_set, sampler, out_dir)
    with process.StopSignals() as stop:
        try:
            train(run, train_loader, sampler, val_loader, val_set, device, stop)
        except engine.NotFiniteError as error:
            if not error.batches:
                raise
            path = out_dir / f"not_finite_rank{process.get_rank()}.pt"
            checkpoint.save(path, {"batches": error.batches, "epoch": run.progress.epoch, "step": run.progress.step})
            raise UserError(f"{error}. The batch is saved in {path}") from error
        except (RuntimeError, WorkerDiedError) as error:
            if not stop.signum:
                raise
            # The signal went to workers and peers as well. What the last step left is whole, save for BatchNorm's
            # statistics, which the forward pass of this one may have moved.
            log.warning("%s", error)
            if not recipe.train_bn:
                run.save_last()
            return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
