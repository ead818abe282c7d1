"""A training run: its state, how it is saved, and how it is resumed."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from tqdm import tqdm

from retinanet import __version__, process
from retinanet.data.dataset import DetectionDataset
from retinanet.data.report import counted
from retinanet.data.sampler import epoch_size, repeat_factors
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.process import log, shows_progress
from retinanet.signals import undisturbed
from retinanet.training import checkpoint
from retinanet.training.accounting import Progress
from retinanet.training.log import RunLog
from retinanet.training.recipes import EMA, RECIPES, Schedule, make_optimizer
from retinanet.training.resume import CHANGING, NOT_CONTINUED, check_state
from retinanet.training.settings import Settings

MOST_LINES = 1000  # about steps in the log of a run, if there is no progress bar


class Run:
    """A training run, at its start unless `restore` is called; it prepares `net` as the recipe says."""

    def __init__(self, settings: Settings, net: RetinaNet, device: torch.device, train_set: DetectionDataset):
        recipe = RECIPES[settings.recipe]
        self.settings, self.device, self.train_set = settings, device, train_set
        net.focalLoss.best_match_iou = recipe.best_match_iou
        net.train()
        net.freeze_bn(not recipe.train_bn, recipe.fix_affine)
        net.freeze_stages(settings.freeze_stages)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(net, recipe, settings.lr, settings.backbone_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.dtype == torch.float16)
        self.epoch_size = epoch_size(repeat_factors(train_set, settings.balance, settings.tile))
        self.steps_per_epoch = -(-self.epoch_size // settings.global_batch)
        self.ema = EMA(net, settings.ema) if settings.ema is not None else None
        self.schedule = Schedule(self.optimizer, recipe, settings.epochs * self.steps_per_epoch)
        self.log: RunLog | None = None  # on rank 0
        self.on_log: Callable[[dict[str, float]], object] | None = None  # called on rank 0
        self.on_validation: Callable[[dict[str, float]], object] | None = None  # called on rank 0
        self.progress = Progress()
        self.best = -1.0  # AP of best.pt
        self.stale = 0  # validations since best.pt
        self.metrics: dict[str, float] = {}  # of this epoch's validation; empty without one
        self.score_thresholds: dict[str, Any] = {}  # scores of the best F1 in that validation; on rank 0
        self.last_ap: float | None = None  # of the last validation
        self.clock: tuple[float, int] | None = None  # time after this process's first step, and steps done by then
        self.saved_at = time.monotonic()

    @property
    def detector(self) -> RetinaNet:
        """The model that is validated and saved: the averaged one, if there is one."""
        return self.ema.model if self.ema else self.net

    @property
    def position(self) -> tuple[int, int]:
        """The epoch, and the number of its optimizer steps that are done."""
        return self.progress.epoch, self.progress.step

    @property
    def steps_done(self) -> int:
        """Number of optimizer steps of the whole run that are done."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done, or `--early_stop` ends the run earlier."""
        settings = self.settings
        return self.progress.epoch >= settings.epochs or bool(settings.early_stop and self.stale >= settings.early_stop)

    def header(self) -> str:
        """The data, the model and the settings, in one line."""
        settings, recipe, train_set = self.settings, RECIPES[self.settings.recipe], self.train_set
        num_weights = sum(weight.numel() for weight in self.net.parameters())
        images, boxes = counted(len(train_set), "image"), counted(len(train_set.annotations), "box")
        sizes = f"{' to '.join(map(str, settings.jitter or [settings.min_side]))} / {settings.max_side}"
        if settings.tile:
            tiles = f"tiles of {settings.tile} x {settings.tile}"
            sizes = f"{tiles}, resized to {sizes}" if settings.jitter else tiles
        if settings.scale_jitter:
            sizes += " x {:g} to {:g}".format(*settings.scale_jitter)
        batches = "1 batch" if settings.accumulate == 1 else f"{settings.accumulate} batches"
        batch = [counted(settings.batch_size, "image"), batches, counted(process.get_world_size(), "process")]
        balanced = settings.balance is not None and not settings.tile
        steps = [
            f"recipe {settings.recipe}",
            f"learning rate {settings.lr:.3g} ({recipe.lr:.3g} for {counted(recipe.reference_batch, 'image')})",
            f"backbone x {settings.backbone_lr:g}" if settings.backbone_lr != 1 else "",
            f"frozen stages: {settings.freeze_stages}" if settings.freeze_stages != recipe.freeze_stages else "",
            f"{sizes} pixels",
            f"global batch {settings.global_batch} = {' x '.join(batch)}",
            counted(settings.epochs, "epoch"),
            f"EMA {settings.ema}" if settings.ema is not None else "",
            f"{counted(self.epoch_size, 'tile')} an epoch" if settings.tile else "",
            f"balance {settings.balance:g}: {images} seen as {self.epoch_size:,} an epoch" if balanced else "",
        ]
        source, classes = settings.other.get("dataset", train_set.source), counted(train_set.num_classes(), "class")
        parts = [
            f"{source}: {images}, {boxes}, {classes}",
            f"ResNet-{settings.depth}, {num_weights / 1e6:.1f} M parameters, weights: {settings.weights}",
            f"{self.device}, {str(settings.dtype).removeprefix('torch.')}",
            ", ".join(filter(None, steps)),
            f"retinanet {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}",
        ]
        return " | ".join(parts)

    def write_step(self, entry: dict[str, float]) -> None:
        """Add an entry about a step to the log, on rank 0; without a progress bar, print up to about MOST_LINES."""
        if not self.log:
            return
        self.log.write(entry)
        if self.on_log:
            self.on_log(dict(entry))
        num_entries = self.settings.epochs * self.steps_per_epoch // self.settings.log_every
        every = self.settings.log_every * (1 + num_entries // MOST_LINES)
        is_last = entry["step"] == self.steps_per_epoch  # the end of an epoch has a line of its own
        if entry["step"] % every == 0 and not is_last and not shows_progress():
            text = "epoch {epoch}, step {step} of {steps}: class loss {class_loss:.3f}, box loss {box_loss:.3f}, "
            text += "lr {lr:.1e}, {images_per_second:.1f} images/s"
            log.info("%s%s", text.format(steps=self.steps_per_epoch, **entry), self.outlook())

    def outlook(self) -> str:
        """The end of a line about a step: the AP of the last validation, and the time left."""
        return (f", AP {self.last_ap:.3f}" if self.last_ap is not None else "") + self.time_left()

    def time_left(self) -> str:
        """The time left, validations included, estimated from the steps so far; "" before there is an estimate."""
        start, first = self.clock or (0.0, self.steps_done)
        left = self.settings.epochs * self.steps_per_epoch - self.steps_done
        if self.steps_done == first or not left:
            return ""
        pace = (time.monotonic() - start) / (self.steps_done - first)  # seconds per step
        return f", {tqdm.format_interval(pace * left)} left"

    def after_step(self, signum: int, check_norm: Callable[[], object]) -> None:
        """Call after every optimizer step: update the average, save if a checkpoint is due, and stop on a signal."""
        self.clock = self.clock or (time.monotonic(), self.steps_done)
        if self.ema:
            self.ema.update(self.net)
        number, unit = self.settings.checkpoint_every
        due = self.progress.step % number == 0 if unit == "steps" else time.monotonic() - self.saved_at > 60 * number
        if signum or due:
            check_norm()  # its error message says more than that of `save`
        if signum:
            self.stop(signum)
        if due:
            self.save_last()

    def end_epoch(self, statistics: dict[str, float]) -> None:
        """Call after every epoch, with the result of `train_one_epoch`; its validation has set `metrics`."""
        with undisturbed():
            self.schedule.end_epoch(statistics["loss"])
            epoch = self.progress.epoch
            self.progress = Progress(epoch + 1)
            entry = {"epoch": epoch, **statistics, **self.metrics}
            if self.log:
                self.log.write(entry)
            if self.metrics:
                self.stale += 1
                self.last_ap = ap = self.metrics["AP"]
                if ap > self.best or ap < 0:  # -1: no boxes, so the last model is as good as any
                    self.best, self.stale = ap, 0
                    self.save("best.pt")
            self.save_last()
        # Called after the epoch is saved, because an experiment tracker may fail.
        if self.log and self.on_log:
            self.on_log(entry)
        if self.log and self.on_validation and self.metrics:
            self.on_validation({"epoch": epoch, **self.metrics})

    def save(self, name: str, **extra: Any) -> None:
        """Write a checkpoint, on rank 0.

        Raises:
            UserError: it cannot be written, or a weight is not finite; an earlier file is intact.
        """
        self.saved_at = time.monotonic()
        if not process.is_main_process():
            return
        if not torch.stack([weight.detach().isfinite().all() for weight in self.net.parameters()]).all():
            epoch, step = self.position
            raise UserError(
                f"{name} stays as it was: a weight is not finite in epoch {epoch}, after step {step}; lower the "
                "learning rate (--lr), or clip the gradient (--clip_norm)"
            )
        settings, data = self.settings, self.train_set
        entries = checkpoint.model_entries(
            self.detector, list(data.labels.values()), *settings.sides, settings.limits, self.score_thresholds,
            settings.tiling, data.pixel_range,
        )  # fmt: skip
        progress = {"epoch": self.progress.epoch, "metrics": self.metrics}
        checkpoint.save(Path(settings.out_dir) / name, entries | progress | extra)

    def state(self) -> dict[str, Any]:
        """Everything, apart from the model, that `restore` needs to continue exactly from here."""
        state = {
            "args": self.settings.as_dict(),
            "num_images": len(self.train_set),
            "progress": asdict(self.progress),
            "best": self.best,
            "stale": self.stale,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.scheduler.state_dict(),
            "random": process.random_states(),
            "log_size": self.log.flush() if self.log else 0,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        if self.ema:
            state |= {"weights": self.net.state_dict(), "ema_steps": self.ema.steps}
        return state

    def save_last(self) -> None:
        """Write last.pt, from which `restore` continues."""
        self.save("last.pt", training=self.state())

    def restore(self, path: Path, content: dict[str, Any]) -> None:
        """Continue from the `content` of the file `path`, a UserError if it is not from `save_last`.

        `net` must have been loaded from the same file.
        """
        with checkpoint.checked(path, NOT_CONTINUED):
            state, own = content["training"], self.state()
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            check_state(state, own, weights, self.settings, self.steps_per_epoch)
            self.metrics = content["metrics"]
            self.last_ap = self.metrics.get("AP")
            self.progress = Progress(**state["progress"])
            self.best, self.stale = state["best"], state["stale"]
            # Everything but the rates and the counters follows from the settings, and is not taken from the file.
            saved = state["optimizer"]
            groups = own["optimizer"]["param_groups"]
            for group, found in zip(groups, saved["param_groups"], strict=True):
                group["lr"] = found["lr"]
            self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            changed = {key: state["schedule"][key] for key in CHANGING if key in own["schedule"]}
            self.schedule.scheduler.load_state_dict(own["schedule"] | changed)
            if self.scaler.is_enabled():
                changed = {key: state["scaler"][key] for key in ("scale", "_growth_tracker")}
                self.scaler.load_state_dict(own["scaler"] | changed)
            if self.ema:
                self.net.load_state_dict(state["weights"])
                self.ema.steps = state["ema_steps"]
            process.set_random_states(state["random"])

    def stop(self, signum: int) -> NoReturn:
        """Save the run, and exit on all ranks together with the signal's exit status."""
        self.save_last()
        process.from_main_process(None)  # wait until the file is written: torchrun ends all ranks when one has exited
        log.info("stopped and saved in epoch %d, after step %d; --resume auto continues", *self.position)
        raise SystemExit(128 + signum)
