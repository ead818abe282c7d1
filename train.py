"""Train a RetinaNet on COCO, CSV, Pascal VOC, YOLO or generated data; in one process, or in many under torchrun."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from retinanet import __version__, inference, process
from retinanet.commands import flags
from retinanet.data.checks import check_before_training, write_skipped
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import WorkerDiedError, explained, make_loader
from retinanet.data.report import counted
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Resizer
from retinanet.errors import UserError
from retinanet.evaluation import coco as coco_eval
from retinanet.evaluation import voc
from retinanet.evaluation.errors import judge
from retinanet.evaluation.report import limits_note
from retinanet.model import ARCHITECTURES, RetinaNet, resnet
from retinanet.process import log, script
from retinanet.signals import StopSignals
from retinanet.training import checkpoint
from retinanet.training.engine import train_one_epoch
from retinanet.training.files import replaced
from retinanet.training.finite import NotFiniteError
from retinanet.training.log import RunLog, read_log
from retinanet.training.recipes import RECIPES
from retinanet.training.resume import check_resume, find_checkpoint
from retinanet.training.run import Run
from retinanet.training.settings import Settings
from retinanet.visual import anchor_report, charts, data_views, views

# What --weights may name in place of a file.
PRETRAINED = {"imagenet": "IMAGENET1K_V1", "imagenet_v2": "IMAGENET1K_V2", "none": False}


def interval(text: str) -> tuple[int, str]:
    """Argparse type: `500` for optimizer steps, or `10m` for minutes."""
    try:
        return flags.positive_int(text.removesuffix("m")), "minutes" if text.endswith("m") else "steps"
    except (argparse.ArgumentTypeError, ValueError) as error:
        message = f"must be a number of steps, such as 500, or minutes, such as 10m, not {text[:100]}"
        raise argparse.ArgumentTypeError(message) from error


def make_parser() -> argparse.ArgumentParser:
    """The parser of all flags."""
    parser = flags.make_parser(__doc__)
    flags.add_data_arguments(parser, training=True)
    add = parser.add_argument_group("model").add_argument
    count, rate, text = flags.positive_int, flags.positive_float, f"layers of the ResNet {flags.DEFAULT}"
    add("--depth", type=count, choices=sorted(ARCHITECTURES), default=50, help=text)
    add("--weights", default="imagenet", help=f"imagenet, imagenet_v2, none (random) or a checkpoint {flags.DEFAULT}")
    flags.add_anchor_arguments(parser)
    add = parser.add_argument_group("training").add_argument
    text = "optimizer and schedule: the original's, from ImageNet weights; those of the paper's authors, from ImageNet "
    text += f"weights; or one for random weights, scratch {flags.DEFAULT}"
    add("--recipe", choices=sorted(RECIPES), default="original", help=text)
    add("--epochs", type=count, default=100, help=f"passes over the training set {flags.DEFAULT}")
    add("--batch_size", type=count, default=2, help=f"images a batch, of each process {flags.DEFAULT}")
    add("--accumulate", type=count, default=1, help=f"batches averaged for one optimizer step {flags.DEFAULT}")
    add("--lr", type=rate, help="peak learning rate (default: the recipe's, in proportion to the global batch)")
    add("--backbone_lr", type=rate, default=1.0, help=f"learning rate of the backbone, times that {flags.DEFAULT}")
    text = "leave so many stages of the backbone as they are: 1 is conv1, 2 adds the first residual stage, ..."
    text += " (default: the recipe's; paper 2, others 0)"
    add("--freeze_stages", type=flags.non_negative_int, choices=range(5), help=text)
    add("--clip_norm", type=rate, help="limit of the gradient's norm (default: the recipe's)")
    add("--ema", type=flags.fraction, help="average the weights with this decay, such as 0.999, and save the average")
    add("--early_stop", type=count, help="stop after this many validations without a better AP")
    add("--seed", type=flags.non_negative_int, default=0, help=f"for weights, order and augmentation {flags.DEFAULT}")
    add = parser.add_argument_group("images").add_argument
    add("--min_side", type=count, default=608, help=f"pixels of the resized short side {flags.DEFAULT}")
    add("--max_side", type=count, default=1024, help=f"limit of the resized long side, pixels {flags.DEFAULT}")
    flags.add_augmentation_arguments(parser)
    flags.add_detection_arguments(parser, of_model=False)
    flags.add_machine_arguments(parser)
    add = parser.add_argument_group("output").add_argument
    add("--out_dir", default="runs/train", help=f"folder for checkpoints and logs {flags.DEFAULT}")
    add("--resume", help="continue a run: auto (from last.pt of --out_dir, if it exists), or the path of a last.pt")
    add("--checkpoint_every", type=interval, default="10m", help=f"steps (500) or minutes (10m) {flags.DEFAULT}")
    add("--val_every", type=count, default=1, help=f"epochs from one validation to the next {flags.DEFAULT}")
    add("--log_every", type=count, default=20, help=f"optimizer steps between lines of log.jsonl {flags.DEFAULT}")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard as well")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error lists all contradictions and exits with 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_train"])
    if args.max_side < args.min_side:
        errors.append(f"--max_side {args.max_side} is below --min_side {args.min_side}")
    if args.jitter and not args.jitter[0] <= args.jitter[1] <= args.max_side:
        errors.append(f"--jitter {args.jitter[0]} {args.jitter[1]} must rise, and end at --max_side {args.max_side}")
    val_set = args.csv_val or "none" if args.dataset == "csv" else getattr(args, f"{args.dataset}_val_set", None)
    if args.early_stop and val_set == "none":
        errors.append("--early_stop needs a validation set")
    if args.ema == 1:
        errors.append("--ema 1 would never change the weights")
    if errors:
        parser.error("; ".join(errors))
    return args


def make_model(args: argparse.Namespace, num_classes: int) -> RetinaNet:
    """The model that a new run starts from."""
    try:
        net = resnet(args.depth, num_classes, PRETRAINED.get(args.weights, False), flags.anchors_from_arguments(args))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    if args.weights not in PRETRAINED:
        log.info("%s", checkpoint.load_weights(net, args.weights))
    return net


def make_run(args: argparse.Namespace, settings: Settings, device: torch.device, train_set: DetectionDataset) -> Run:
    """A new run, or the one that `--resume` means."""
    path = find_checkpoint(settings)
    if path is None:
        run, log_size = Run(settings, make_model(args, train_set.num_classes()), device, train_set), 0
    else:
        net, content = checkpoint.load_model(path)
        check_resume(path, settings, content, train_set)
        run, log_size = Run(settings, net, device, train_set), content["training"]["log_size"]
        run.restore(path, content)
        log.info("resuming %s in epoch %d, after step %d", path, *run.position)
    if process.is_main_process():
        run.log = RunLog(settings.out_dir, path, log_size, settings.tensorboard, run.steps_per_epoch)
    return run


def log_header(args: argparse.Namespace, run: Run, device: torch.device, num_boxes: int) -> None:
    """Log in one line what is trained, on what, and how."""
    settings, recipe = run.settings, RECIPES[run.settings.recipe]
    log.info(
        "%s: %s, %s, %s | ResNet-%d, %.1f M parameters, weights: %s | %s, %s | recipe %s, "
        "learning rate %.3g (%.3g for %s)%s%s, global batch %d = %s x %s x %s, %s%s | "
        "retinanet %s, torch %s, torchvision %s",
        args.dataset, counted(run.num_images, "image"), counted(num_boxes, "box"),
        counted(len(run.class_names), "class"),
        args.depth, sum(weight.numel() for weight in run.net.parameters()) / 1e6, args.weights,
        device, str(settings.dtype).removeprefix("torch."), settings.recipe, settings.lr, recipe.lr,
        counted(recipe.reference_batch, "image"),
        "" if settings.backbone_lr == 1 else f", backbone x {settings.backbone_lr:g}",
        "" if settings.freeze_stages == recipe.freeze_stages else f", frozen stages: {settings.freeze_stages}",
        settings.global_batch, counted(settings.batch_size, "image"),
        "1 batch" if settings.accumulate == 1 else f"{settings.accumulate} batches",
        counted(process.get_world_size(), "process"), counted(settings.epochs, "epoch"),
        "" if settings.ema is None else f", EMA {settings.ema}",
        __version__, torch.__version__, torchvision.__version__,
    )  # fmt: skip
    if args.weights == "none" and settings.recipe != "scratch":
        log.warning("warning: recipe %s does not learn from random weights; use --recipe scratch", settings.recipe)


def validate(
    run: Run, loader: DataLoader, dataset: DetectionDataset, device: torch.device, stop: StopSignals
) -> dict[str, float]:
    """COCO's numbers of the detector, computed by all ranks together."""
    settings = run.settings
    process.broadcast_buffers(run.detector)  # each rank has BatchNorm statistics of its own
    with process.seeded(settings.seed):  # what a loader draws here must not change the training
        stopped, limits = (lambda: bool(stop.signum)), settings.limits
        found = inference.detect(run.detector, loader, device, settings.dtype, stopped, **limits)
    signum = max(process.gather_objects(stop.signum))
    if signum:
        run.stop(signum)
    metrics = None
    if process.is_main_process():
        metrics = coco_eval.score(dataset, found, limits["max_detections"]).metrics
        run.score_thresholds = voc.best_scores(voc.evaluate_detections(dataset, found), dataset)
        log.info("%s", coco_eval.metrics_table(metrics))
        with drawing(run, "detections.png"):
            views.save_detections(dataset, judge(dataset, found, 0.5), Path(settings.out_dir) / "detections.png")
    return process.from_main_process(metrics)


@contextlib.contextmanager
def drawing(run: Run, what: str) -> Iterator[None]:
    """Within the context, `what` is drawn. No image is worth a run: an error is a warning, once."""
    try:
        yield
    except (OSError, ValueError) as error:
        if what not in run.not_drawn:
            log.warning("warning: no %s: %s", what, error)
        run.not_drawn.add(what)


def train(
    run: Run,
    train_loader: DataLoader,
    sampler: AspectRatioBasedSampler,
    val_loader: DataLoader | None,
    val_set: DetectionDataset | None,
    device: torch.device,
    stop: StopSignals,
) -> None:
    """Train and validate, epoch by epoch, until the run is over or a signal comes."""
    settings = run.settings
    model = run.net
    if process.get_world_size() > 1:
        devices = [device] if device.type == "cuda" else None
        model = DistributedDataParallel(run.net, device_ids=devices, gradient_as_bucket_view=True)
    while not run.is_over:
        epoch = run.progress.epoch
        sampler.set_epoch(*run.position)
        statistics = train_one_epoch(
            model, train_loader, run.optimizer, run.scaler, run.schedule, device, settings.dtype, run.progress,
            settings.clip_norm, settings.accumulate, stop_signal=lambda: stop.signum, after_step=run.after_step,
            log_step=run.write, log_every=settings.log_every,
        )  # fmt: skip
        log.info(
            "epoch %d: class loss %.3f, box loss %.3f, %.1f images/s",
            epoch, statistics["class_loss"], statistics["box_loss"], statistics["images_per_second"],
        )  # fmt: skip
        is_last = epoch + 1 == settings.epochs
        run.metrics, run.score_thresholds = {}, {}
        if val_loader is not None and ((epoch + 1) % settings.val_every == 0 or is_last):
            run.metrics = validate(run, val_loader, val_set, device, stop)
        run.end_epoch(statistics)
        if run.log and (run.metrics or is_last):
            with drawing(run, "curves.png"):
                charts.draw_training_curves(read_log(run.log.path), run.steps_per_epoch, run.log.folder / "curves.png")
    best = f", best AP {run.best:.3f}" if run.best >= 0 else ""
    log.info("done after %s%s", counted(run.progress.epoch, "epoch"), best)


@script
def main(argv: list[str] | None = None) -> int:
    """Train as the flags say."""
    args = parse_arguments(argv)
    device = process.choose_device(args.device)
    process.init_distributed(device)
    process.setup_logging()
    settings = Settings.resolve(vars(args), device)
    process.seed_everything(settings.seed)

    train_set = flags.make_dataset(args, "train", flags.training_transform(args))
    val_set = flags.make_dataset(args, "val", Resizer(args.min_side, args.max_side))
    check_before_training(train_set, val_set, args.strict)
    ranks = process.get_rank(), process.get_world_size()
    sampler = AspectRatioBasedSampler(train_set, args.batch_size, False, args.seed, *ranks, args.accumulate)
    train_loader = make_loader(train_set, args.batch_size, args.workers, sampler, device=device)
    val_loader = make_loader(val_set, args.batch_size, args.workers, device=device) if val_set else None

    out_dir = flags.make_out_dir(args.out_dir)
    run = make_run(args, settings, device, train_set)
    with StopSignals() as stop:
        log_header(args, run, device, len(train_set.annotations))
        if process.is_main_process():
            write_skipped(out_dir, [train_set, val_set])
            with replaced(out_dir / "args.json") as file:
                file.write(json.dumps(settings.as_dict(), indent=2).encode())
            best_match_iou = RECIPES[settings.recipe].best_match_iou
            anchor_report.log_summary(train_set, run.net.anchors, args.min_side, args.max_side, best_match_iou)
            with drawing(run, "labels.png and batch.png"):
                data_views.save_data_images(train_set, sampler, out_dir)
            if val_set and (note := limits_note(val_set, range(len(val_set)), settings.limits["max_detections"])):
                log.warning("%s", note)
        try:
            with explained(train_loader, settings.dtype):  # a worker may die at any time
                train(run, train_loader, sampler, val_loader, val_set, device, stop)
        except NotFiniteError as error:
            if not error.batches:
                raise
            path = out_dir / f"not_finite_rank{process.get_rank()}.pt"
            checkpoint.save(path, {"batches": error.batches, "epoch": run.progress.epoch, "step": run.progress.step})
            paths = [train_set.image_path(index) for batch in error.batches for index in batch["index"]]
            raise UserError(f"{error}. The batch ({', '.join(paths)}) is saved in {path}") from error
        except (RuntimeError, WorkerDiedError) as error:
            if not stop.signum:
                raise
            # The signal went to workers and peers as well. What the last step left is complete, except for BatchNorm's
            # statistics, which the forward pass of this one may have changed.
            log.warning("%s", error)
            if not RECIPES[settings.recipe].train_bn:
                run.save_last()
            return 128 + stop.signum
    return 0


if __name__ == "__main__":
    sys.exit(main())
