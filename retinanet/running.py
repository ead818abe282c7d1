"""A whole training run, as train.py starts it: checks, loaders, model, epochs, validation, and the files it leaves."""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
from retinanet.model import RetinaNet
from retinanet.postprocess import Detections
from retinanet.process import log, optional
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
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # this enables gradients, too, if the caller disabled them
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.enter_context(transformed(train_set, training_transform(settings), by_parts=bool(settings.tile)))
        stack.enter_context(transformed(val_set, Resizer(*settings.sides, enlarge=not settings.tile)))
        check_before_training(train_set, val_set, settings.strict)
        batch, workers = settings.batch_size, settings.workers
        sampler = AspectRatioBasedSampler(
            train_set, batch, False, settings.seed, process.get_rank(), process.get_world_size(), settings.accumulate,
            settings.balance, settings.tile,
        )  # fmt: skip
        train_loader, val_loader = make_loader(train_set, batch, workers, sampler, device=device), None
        if val_set is not None:
            val_loader = make_loader(val_set, batch, workers, device=device, tiling=settings.tiling)

        make_out_dir(settings.out_dir)
        stack.enter_context(train_set.scaled())
        run = _make_run(settings, device, train_set)
        if run.log:
            stack.callback(run.log.close)
        if val_set is not None:
            stack.enter_context(val_set.scaled(train_set.pixel_range))
        run.on_log, run.on_validation = on_log, on_validation
        stop = stack.enter_context(StopSignals(in_program))
        training = _Training(run, sampler, train_loader, val_loader, val_set, stop)
        training.begin()
        with training.saving(), explained(train_loader, settings.dtype):  # a worker may die
            training.train()
        if val_set is not None:
            training.report()
        return run


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


@dataclass
class _Training:
    """A run, what it reads, and the signals that may stop it. All ranks call the methods together."""

    run: Run
    sampler: AspectRatioBasedSampler
    train_loader: DataLoader
    val_loader: DataLoader | None
    val_set: DetectionDataset | None
    stop: StopSignals
    of_best: dict[int, Detections] | None = None  # in the validation set, by best.pt; None if it is from before
    warned: set[str] = field(default_factory=set)  # of files that cannot be written

    def begin(self) -> None:
        """Log and write, on rank 0, what is known before the first step."""
        run, val_set, settings = self.run, self.val_set, self.run.settings
        train_set, out_dir = run.train_set, Path(settings.out_dir)
        log.info("%s", run.header())
        if settings.weights == "none" and settings.recipe != "scratch":
            log.warning("warning: recipe %s does not learn from random weights; use --recipe scratch", settings.recipe)
        if not process.is_main_process():
            return
        write_skipped(out_dir, [train_set, val_set])
        with replaced(out_dir / "args.json") as file:
            file.write(json.dumps(settings.as_dict(), indent=2).encode())
        sides = (None, None) if settings.tile else settings.sides
        anchor_report.log_summary(train_set, run.net.anchors, *sides, RECIPES[settings.recipe].best_match_iou)
        views.save_data_images(train_set, self.sampler, out_dir)
        if val_set and (note := report.limits_note(val_set, range(len(val_set)), settings.max_detections)):
            log.warning("%s", note)

    def train(self) -> None:
        """Train and validate, epoch by epoch, until the run is over or a signal arrives."""
        run, settings, model = self.run, self.run.settings, self.run.net
        if process.get_world_size() > 1:
            devices = [run.device] if run.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        while not run.is_over:
            epoch = run.progress.epoch
            self.sampler.set_epoch(*run.position)
            statistics = train_one_epoch(
                model, self.train_loader, run.optimizer, run.scaler, run.schedule, run.device, settings.dtype,
                run.progress, settings.clip_norm, settings.accumulate, stop_signal=lambda: self.stop.signum,
                after_step=run.after_step, log_step=run.write_step, log_every=settings.log_every, outlook=run.outlook,
            )  # fmt: skip
            text = "class loss {class_loss:.3f}, box loss {box_loss:.3f}, {images_per_second:.1f} images/s"
            log.info("epoch %d: %s%s", epoch, text.format(**statistics), run.time_left())
            is_last = epoch + 1 == settings.epochs
            run.metrics, run.score_thresholds = {}, {}
            if self.val_set is not None and ((epoch + 1) % settings.val_every == 0 or is_last):
                found = self.validate()
            run.end_epoch(statistics)
            if run.metrics and not run.stale:  # best.pt is from this epoch
                self.of_best = found
            if run.log and (run.metrics or is_last):
                curves = run.log.folder / "curves.png"
                with optional("curves.png", self.warned):
                    charts.draw_training_curves(read_log(run.log.path), run.steps_per_epoch, curves)
        best = f", best AP {run.best:.3f}" if run.best >= 0 else ""
        log.info("done after %s%s", counted(run.progress.epoch, "epoch"), best)

    def validate(self) -> dict[int, Detections]:
        """Set the run's `metrics` and, on rank 0, `score_thresholds`; returns the detections by sample index."""
        run, dataset = self.run, self.val_set
        process.broadcast_buffers(run.detector)  # because each rank has its own BatchNorm statistics
        with process.seeded(run.settings.seed):  # random numbers that the loader draws must not change the training
            found = self.detect(run.detector)
        if signum := max(process.gather_objects(self.stop.signum)):
            run.stop(signum)
        metrics = None
        if process.is_main_process():
            metrics = coco_eval.score(dataset, found, run.settings.max_detections).metrics
            results = voc.evaluate_detections(dataset, found)
            run.score_thresholds = voc.best_scores(results, dataset)
            log.info("%s", coco_eval.metrics_table(metrics))
            with optional("detections.png", self.warned):
                sheet = run.log.folder / "detections.png"
                views.save_detections(dataset, judge(dataset, found, 0.5), sheet)
                run.log.add_pictures(run.progress.epoch, sheet, voc.board_curves(results, dataset))
        run.metrics = process.from_main_process(metrics)
        return found

    def detect(self, net: RetinaNet) -> dict[int, Detections]:
        """The detections of `net` in the validation set, by sample index; a signal ends them early."""
        settings = self.run.settings
        stopped, limits = (lambda: bool(self.stop.signum)), settings.limits
        return detection.detect(net, self.val_loader, self.run.device, settings.dtype, stopped, **limits)

    def report(self) -> None:
        """Write report.html, about best.pt on the validation set, unless there is a current one."""
        run, found = self.run, self.of_best
        best, page = (Path(run.settings.out_dir) / name for name in ("best.pt", "report.html"))
        done = not best.is_file() or (page.is_file() and page.stat().st_mtime >= best.stat().st_mtime)
        if process.from_main_process(done):
            return
        try:
            net, info = checkpoint.load_model(best)
            if found is None:
                found = self.detect(net.to(run.device, memory_format=torch.channels_last))
            if run.log and not self.stop.signum:
                evaluation = report.Evaluation(self.val_set, found, limit=run.settings.max_detections)
                write_page(page, evaluation, str(best), (net, info))
                log.info("report of the detector's errors: %s", page)
        except (OSError, ValueError, RuntimeError) as error:  # the run itself is complete
            log.warning("warning: no report.html: %s", error)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within the context, a batch without finite losses is saved, as is the run if a signal kills its workers."""
        run = self.run
        try:
            yield
        except NotFiniteError as error:
            if not error.batches:
                raise
            path = Path(run.settings.out_dir) / f"not_finite_rank{process.get_rank()}.pt"
            checkpoint.save(path, {"batches": error.batches, "epoch": run.progress.epoch, "step": run.progress.step})
            paths = [run.train_set.image_path(index) for batch in error.batches for index in batch["index"]]
            raise UserError(f"{error}. The batch ({', '.join(paths)}) is saved in {path}") from error
        except (RuntimeError, WorkerDiedError) as error:
            if not self.stop.signum:
                raise
            # The signal went to workers and other ranks as well. The state after the last step is complete, except for
            # BatchNorm's statistics, which the forward pass of the interrupted step may have changed.
            log.warning("%s", error)
            if not RECIPES[run.settings.recipe].train_bn:
                run.save_last()
            raise SystemExit(128 + self.stop.signum) from error
