"""A training run: what changes while it trains, how it is saved, and how it is resumed."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from retinanet.data.dataset import DetectionDataset
from retinanet.data.sampler import epoch_size, repeat_factors
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.process import from_main_process, is_main_process, log, random_states, set_random_states, shows_progress
from retinanet.signals import undisturbed
from retinanet.training import checkpoint
from retinanet.training.accounting import Progress
from retinanet.training.log import RunLog
from retinanet.training.recipes import EMA, RECIPES, Schedule, make_optimizer
from retinanet.training.resume import CHANGING, NOT_CONTINUED, check_state
from retinanet.training.settings import Settings

MOST_LINES = 1000  # of the steps of a run, where no progress bar shows them


class Run:
    """A training run, at its beginning until `restore` is called; it changes `net` as the recipe says."""

    def __init__(self, settings: Settings, net: RetinaNet, device: torch.device, train_set: DetectionDataset):
        recipe = RECIPES[settings.recipe]
        self.settings, self.device = settings, device
        self.class_names = list(train_set.labels.values())
        self.num_images = len(train_set)
        self.pixel_range = train_set.pixel_range
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
        self.on_log: Callable[[dict[str, float]], object] | None = None  # likewise
        self.on_validation: Callable[[dict[str, float]], object] | None = None
        self.progress = Progress()
        self.best = -1.0  # AP of best.pt
        self.stale = 0  # validations since then
        self.metrics: dict[str, float] = {}  # of the last validation
        self.score_thresholds: dict[str, Any] = {}  # of the best F1 there; on rank 0
        self.last_ap: float | None = None  # of the last validation
        self.clock: tuple[float, int] | None = None  # when this process had done its first step, and steps done then
        self.saved_at = time.monotonic()
        self.not_drawn: set[str] = set()  # images that could not be written

    @property
    def detector(self) -> RetinaNet:
        """The model that is validated and saved: the averaged one, if there is one."""
        return self.ema.model if self.ema else self.net

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and optimizer steps of it that are done."""
        return self.progress.epoch, self.progress.step

    @property
    def steps_done(self) -> int:
        """Optimizer steps of the whole run that are done."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    @property
    def is_over(self) -> bool:
        """Whether all epochs are trained, or `--early_stop` ends the run before."""
        settings = self.settings
        return self.progress.epoch >= settings.epochs or bool(settings.early_stop and self.stale >= settings.early_stop)

    def write_step(self, entry: dict[str, float]) -> None:
        """Add an entry about a step to the log, on rank 0."""
        if self.log:
            self.log.write(entry)
            if self.on_log:
                self.on_log(dict(entry))
            if not shows_progress():
                self._log_step(entry)

    def _log_step(self, entry: dict[str, float]) -> None:
        """Log an entry as a plain line; of an epoch's last step, whose line follows, and beyond MOST_LINES, none."""
        number, of = self.settings.epochs * self.steps_per_epoch // self.settings.log_every, self.steps_per_epoch
        every = self.settings.log_every * (1 + number // MOST_LINES)
        if entry["step"] % every == 0 and entry["step"] < of:
            log.info(
                "epoch %d, step %d of %d: class loss %.3f, box loss %.3f, lr %.1e, %.1f images/s%s",
                *(entry[name] for name in ("epoch", "step")), of,
                *(entry[name] for name in ("class_loss", "box_loss", "lr", "images_per_second")), self.outlook(),
            )  # fmt: skip

    def outlook(self) -> str:
        """How the run stands, for a line about a step: the AP of the last validation, and the time left."""
        return (f", AP {self.last_ap:.3f}" if self.last_ap is not None else "") + self.time_left()

    def time_left(self) -> str:
        """How long the run still takes, validations included, as far as its steps so far can say."""
        start, first = self.clock or (0.0, self.steps_done)
        left = self.settings.epochs * self.steps_per_epoch - self.steps_done
        if self.steps_done == first or not left:
            return ""
        pace = (time.monotonic() - start) / (self.steps_done - first)  # seconds a step
        return f", {tqdm.format_interval(pace * left)} left"

    def after_step(self, signum: int, check_norm: Callable[[], object]) -> None:
        """Call after every optimizer step: update the average, save if it is time, and stop if a signal came."""
        self.clock = self.clock or (time.monotonic(), self.steps_done)
        if self.ema:
            self.ema.update(self.net)
        number, unit = self.settings.checkpoint_every
        due = self.progress.step % number == 0 if unit == "steps" else time.monotonic() - self.saved_at > 60 * number
        if signum or due:
            check_norm()  # its error says more than that of `save`
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
                self.stale, self.last_ap = self.stale + 1, self.metrics["AP"]
                ap = self.metrics["AP"]
                if ap > self.best or ap < 0:  # without boxes there is no AP, and the last model is as good as any
                    self.best, self.stale = ap, 0
                    self.save("best.pt")
            self.save_last()
        # Only now that the epoch is saved: a tracker may fail.
        if self.log and self.on_log:
            self.on_log(entry)
        if self.log and self.on_validation and self.metrics:
            self.on_validation({"epoch": epoch, **self.metrics})

    def save(self, name: str, **extra: Any) -> None:
        """Write a checkpoint, on rank 0.

        Raises:
            UserError: it cannot be written, or a weight is not finite; the file before it is intact.
        """
        self.saved_at = time.monotonic()
        if not is_main_process():
            return
        if not torch.stack([weight.detach().isfinite().all() for weight in self.net.parameters()]).all():
            epoch, step = self.position
            raise UserError(
                f"{name} stays as it was: a weight is not finite in epoch {epoch}, after step {step}; lower the "
                "learning rate (--lr), or clip the gradient (--clip_norm)"
            )
        settings = self.settings
        found = settings.limits, self.score_thresholds, settings.tiling, self.pixel_range
        entries = checkpoint.model_entries(self.detector, self.class_names, *settings.sides, *found)
        entries |= {"epoch": self.progress.epoch, "metrics": self.metrics}
        checkpoint.save(Path(settings.out_dir) / name, entries | extra)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue exactly from here, beside the model."""
        state = {
            "args": self.settings.as_dict(),
            "num_images": self.num_images,
            "progress": asdict(self.progress),
            "best": self.best,
            "stale": self.stale,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.scheduler.state_dict(),
            "random": random_states(),
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
        """Continue from what `save_last` wrote to `path`, a UserError if it did not; `net` came from the same file."""
        with checkpoint.checked(path, NOT_CONTINUED):
            state, own = content["training"], self.state()
            weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
            check_state(state, own, weights, self.settings, self.steps_per_epoch)
            self.metrics = content["metrics"]
            self.last_ap = self.metrics.get("AP")
            self.progress = Progress(**state["progress"])
            self.best, self.stale = state["best"], state["stale"]
            # All but the rates and the counters follows from the settings, and is not taken from the file.
            saved = state["optimizer"]
            groups = zip(own["optimizer"]["param_groups"], saved["param_groups"], strict=True)
            groups = [group | {"lr": found["lr"]} for group, found in groups]
            self.optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
            changed = {key: state["schedule"][key] for key in CHANGING if key in own["schedule"]}
            self.schedule.scheduler.load_state_dict(own["schedule"] | changed)
            if self.scaler.is_enabled():
                counted = {key: state["scaler"][key] for key in ("scale", "_growth_tracker")}
                self.scaler.load_state_dict(own["scaler"] | counted)
            if self.ema:
                self.net.load_state_dict(state["weights"])
                self.ema.steps = state["ema_steps"]
            set_random_states(state["random"])

    def stop(self, signum: int) -> NoReturn:
        """Save, and end the program with a signal's exit status, on all ranks together."""
        self.save_last()
        from_main_process(None)  # torchrun ends all ranks as soon as one has exited: wait until the file is written
        log.info("stopped and saved in epoch %d, after step %d; --resume auto continues", *self.position)
        raise SystemExit(128 + signum)
