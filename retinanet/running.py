"""A whole training run, as train.py starts it: checks, loaders, model, epochs, validation, and the files it leaves."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from retinanet import detection, process
from retinanet.data.checks import check_before_training, write_skipped
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import WorkerDiedError, explained, make_loader, transformed
from retinanet.data.report import counted
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Resizer
from retinanet.errors import UserError
from retinanet.evaluation import coco as coco_eval
from retinanet.evaluation import report, voc
from retinanet.evaluation.errors import judge
from retinanet.postprocess import Detections
from retinanet.process import log
from retinanet.results import write_page
from retinanet.signals import StopSignals
from retinanet.training import checkpoint
from retinanet.training.engine import train_one_epoch
from retinanet.training.files import make_out_dir, replaced
from retinanet.training.finite import NotFiniteError
from retinanet.training.log import RunLog, read_log
from retinanet.training.recipes import RECIPES
from retinanet.training.resume import check_resume, find_checkpoint
from retinanet.training.run import Run
from retinanet.training.settings import Settings, anchors_from_settings, training_transform
from retinanet.training.weights import make_model
from retinanet.visual import anchor_report, charts, views


def run_training(
    settings: Settings,
    device: torch.device,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    on_log: Callable[[dict[str, float]], object] | None = None,
    on_validation: Callable[[dict[str, float]], object] | None = None,
    in_program: bool = False,
) -> Run:
    """Train with resolved settings and return the finished run; see `retinanet.train` and StopSignals for the rest."""
    process.seed_everything(settings.seed)
    if val_set is train_set:
        val_set = copy.copy(val_set)  # it needs another transform
    if train_set.transform is not None:
        settings = replace(settings, jitter=None)  # it may come from the recipe
        log.info("%s: training uses its own transform, and only validation the sizes of the settings", train_set.source)
    resizer, by_parts = Resizer(*settings.sides, enlarge=not settings.tile), bool(settings.tile)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # this enables gradients, too, if the caller disabled them
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(transformed(train_set, training_transform(settings), by_parts))
        stack.enter_context(transformed(val_set, resizer))
        check_before_training(train_set, val_set, settings.strict)
        ranks = process.get_rank(), process.get_world_size()
        batch = settings.batch_size
        sampler = AspectRatioBasedSampler(
            train_set, batch, False, settings.seed, *ranks, settings.accumulate, settings.balance, settings.tile
        )
        train_loader = make_loader(train_set, batch, settings.workers, sampler, device=device)
        machine = {"device": device, "tiling": settings.tiling}
        val_loader = make_loader(val_set, batch, settings.workers, **machine) if val_set else None

        make_out_dir(settings.out_dir)
        stack.enter_context(train_set.scaled())
        run = _make_run(settings, device, train_set)
        if val_set is not None:
            stack.enter_context(val_set.scaled(train_set.pixel_range))
        run.on_log, run.on_validation = on_log, on_validation
        try:
            with StopSignals(in_program) as stop:
                _begin(run, train_set, val_set, sampler)
                with _saving(run, train_set, stop), explained(train_loader, settings.dtype):  # a worker may die
                    found = _train(run, train_loader, sampler, val_loader, val_set, stop)
                if val_loader is not None:  # a rank may have no batches of it
                    _report(run, val_loader, val_set, stop, found)
            return run
        finally:
            if run.log:
                run.log.close()


def _make_run(settings: Settings, device: torch.device, train_set: DetectionDataset) -> Run:
    """A new run, or the one that `resume` continues."""
    path = find_checkpoint(settings)
    if path is None:
        classes, anchors = list(train_set.labels.values()), anchors_from_settings(settings)
        net = make_model(settings.depth, settings.weights, classes, anchors)
        run, log_size = Run(settings, net, device, train_set), 0
    else:
        net, content = checkpoint.load_model(path)
        check_resume(path, settings, content, train_set)
        train_set.pixel_range = content["pixel_range"] or train_set.pixel_range
        run, log_size = Run(settings, net, device, train_set), content["training"]["log_size"]
        run.restore(path, content)
        log.info("resuming %s in epoch %d, after step %d", path, *run.position)
    if process.is_main_process():
        run.log = RunLog(settings.out_dir, path, log_size, settings.tensorboard, run.steps_per_epoch)
    return run


def _begin(
    run: Run, train_set: DetectionDataset, val_set: DetectionDataset | None, sampler: AspectRatioBasedSampler
) -> None:
    """Log and write, on rank 0, what is known before the first step."""
    settings, out_dir = run.settings, Path(run.settings.out_dir)
    log.info("%s", run.header(train_set))
    if settings.weights == "none" and settings.recipe != "scratch":
        log.warning("warning: recipe %s does not learn from random weights; use --recipe scratch", settings.recipe)
    if not process.is_main_process():
        return
    write_skipped(out_dir, [train_set, val_set])
    with replaced(out_dir / "args.json") as file:
        file.write(json.dumps(settings.as_dict(), indent=2).encode())
    best_match_iou = RECIPES[settings.recipe].best_match_iou
    sides = (None, None) if settings.tile else settings.sides
    anchor_report.log_summary(train_set, run.net.anchors, *sides, best_match_iou)
    with _drawing(run, "labels.png and batch.png"):
        views.save_data_images(train_set, sampler, out_dir)
    limit = settings.limits["max_detections"]
    if val_set and (note := report.limits_note(val_set, range(len(val_set)), limit)):
        log.warning("%s", note)


def _validate(
    run: Run, loader: DataLoader, dataset: DetectionDataset, stop: StopSignals
) -> tuple[dict[str, float], dict[int, Detections]]:
    """Validate the detector on all ranks together: COCO's numbers, and the detections by sample index."""
    settings = run.settings
    process.broadcast_buffers(run.detector)  # because each rank has its own BatchNorm statistics
    with process.seeded(settings.seed):  # random numbers that the loader draws must not change the training
        stopped, limits = (lambda: bool(stop.signum)), settings.limits
        found = detection.detect(run.detector, loader, run.device, settings.dtype, stopped, **limits)
    signum = max(process.gather_objects(stop.signum))
    if signum:
        run.stop(signum)
    metrics = None
    if process.is_main_process():
        metrics = coco_eval.score(dataset, found, limits["max_detections"]).metrics
        results = voc.evaluate_detections(dataset, found)
        run.score_thresholds = voc.best_scores(results, dataset)
        log.info("%s", coco_eval.metrics_table(metrics))
        with _drawing(run, "detections.png"):
            sheet = Path(settings.out_dir) / "detections.png"
            views.save_detections(dataset, judge(dataset, found, 0.5), sheet)
            run.log.add_pictures(run.progress.epoch, sheet, voc.board_curves(results, dataset))
    return process.from_main_process(metrics), found


@contextlib.contextmanager
def _drawing(run: Run, what: str) -> Iterator[None]:
    """Within the context, `what` is drawn. An error must not end the run, so it becomes a warning, once."""
    try:
        yield
    except (OSError, ValueError) as error:
        if what not in run.not_drawn:
            log.warning("warning: no %s: %s", what, error)
        run.not_drawn.add(what)


def _train(
    run: Run,
    train_loader: DataLoader,
    sampler: AspectRatioBasedSampler,
    val_loader: DataLoader | None,
    val_set: DetectionDataset | None,
    stop: StopSignals,
) -> dict[int, Detections] | None:
    """Train and validate, epoch by epoch, until the run is over or a signal arrives.

    Returns the detections of best.pt in the validation set, or None if best.pt is from before this call.
    """
    settings, of_best = run.settings, None
    model = run.net
    if process.get_world_size() > 1:
        devices = [run.device] if run.device.type == "cuda" else None
        model = DistributedDataParallel(run.net, device_ids=devices, gradient_as_bucket_view=True)
    while not run.is_over:
        epoch = run.progress.epoch
        sampler.set_epoch(*run.position)
        statistics = train_one_epoch(
            model, train_loader, run.optimizer, run.scaler, run.schedule, run.device, settings.dtype, run.progress,
            settings.clip_norm, settings.accumulate, stop_signal=lambda: stop.signum, after_step=run.after_step,
            log_step=run.write_step, log_every=settings.log_every, outlook=run.outlook,
        )  # fmt: skip
        log.info(
            "epoch %d: class loss %.3f, box loss %.3f, %.1f images/s%s",
            epoch, *(statistics[name] for name in ("class_loss", "box_loss", "images_per_second")), run.time_left(),
        )  # fmt: skip
        is_last = epoch + 1 == settings.epochs
        run.metrics, run.score_thresholds = {}, {}
        if val_loader is not None and ((epoch + 1) % settings.val_every == 0 or is_last):
            run.metrics, found = _validate(run, val_loader, val_set, stop)
        run.end_epoch(statistics)
        if run.metrics and not run.stale:  # best.pt is from this epoch
            of_best = found
        if run.log and (run.metrics or is_last):
            with _drawing(run, "curves.png"):
                charts.draw_training_curves(read_log(run.log.path), run.steps_per_epoch, run.log.folder / "curves.png")
    best = f", best AP {run.best:.3f}" if run.best >= 0 else ""
    log.info("done after %s%s", counted(run.progress.epoch, "epoch"), best)
    return of_best


def _report(
    run: Run,
    loader: DataLoader,
    dataset: DetectionDataset,
    stop: StopSignals,
    found: dict[int, Detections] | None,
) -> None:
    """Write report.html, about best.pt on the validation set, unless there is a current one.

    `found` are the detections of best.pt; if it is None, all ranks run the detector together.
    """
    settings, best = run.settings, Path(run.settings.out_dir) / "best.pt"
    page = best.with_name("report.html")
    done = not best.is_file() or (page.is_file() and page.stat().st_mtime >= best.stat().st_mtime)
    if process.from_main_process(done):
        return
    try:
        net, info = checkpoint.load_model(best)
        if found is None:
            net.to(run.device, memory_format=torch.channels_last)
            found = detection.detect(
                net, loader, run.device, settings.dtype, lambda: bool(stop.signum), **settings.limits
            )
        if run.log and not stop.signum:
            evaluation = report.Evaluation(dataset, found, limit=settings.limits["max_detections"])
            write_page(page, evaluation, str(best), (net, info))
            log.info("report of the detector's errors: %s", page)
    except (OSError, ValueError, RuntimeError) as error:  # the run itself is complete
        log.warning("warning: no report.html: %s", error)


@contextlib.contextmanager
def _saving(run: Run, train_set: DetectionDataset, stop: StopSignals) -> Iterator[None]:
    """Within the context, a batch without finite losses is saved, as is the run if a signal kills its workers."""
    try:
        yield
    except NotFiniteError as error:
        if not error.batches:
            raise
        path = Path(run.settings.out_dir) / f"not_finite_rank{process.get_rank()}.pt"
        checkpoint.save(path, {"batches": error.batches, "epoch": run.progress.epoch, "step": run.progress.step})
        paths = [train_set.image_path(index) for batch in error.batches for index in batch["index"]]
        raise UserError(f"{error}. The batch ({', '.join(paths)}) is saved in {path}") from error
    except (RuntimeError, WorkerDiedError) as error:
        if not stop.signum:
            raise
        # The signal went to workers and other ranks as well. The state after the last step is complete, except for
        # BatchNorm's statistics, which the forward pass of the interrupted step may have changed.
        log.warning("%s", error)
        if not RECIPES[run.settings.recipe].train_bn:
            run.save_last()
        raise SystemExit(128 + stop.signum) from error
