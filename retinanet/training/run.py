"""A training run: what changes while it trains, how it is saved, and how it is resumed."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch

from retinanet.data.dataset import DetectionDataset, check_classes
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.process import from_main_process, is_main_process, log, random_states, set_random_states, undisturbed
from retinanet.training import checkpoint
from retinanet.training.accounting import Progress
from retinanet.training.log import RunLog
from retinanet.training.recipes import EMA, RECIPES, Schedule, make_optimizer
from retinanet.training.settings import Settings

# Flags that may change when a run is resumed. The batch may be divided in another way; `global_batch` may not change.
FREE_FLAGS = {
    *("resume", "out_dir", "device", "workers", "strict", "batch_size", "accumulate", "val_every", "log_every"),
    *("checkpoint_every", "early_stop", "tensorboard"),
    *("coco_path", "voc_path", "yolo_path", "csv_train", "csv_val", "csv_classes"),
}


class Run:
    """A training run, at its beginning until `restore` is called.

    Args:
        settings: of the run.
        net: the model that it trains; changed as the recipe says, and moved to `device`.
        device: that the run computes on.
        train_set: gives the class names and the number of images.
    """

    def __init__(self, settings: Settings, net: RetinaNet, device: torch.device, train_set: DetectionDataset):
        recipe = RECIPES[settings.recipe]
        self.settings = settings
        self.class_names = list(train_set.labels.values())
        self.num_images = len(train_set)
        net.focalLoss.best_match_iou = recipe.best_match_iou
        net.train()
        net.freeze_bn(not recipe.train_bn)
        self.net = net.to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(net, recipe, settings.lr)
        self.steps_per_epoch = -(-self.num_images // settings.global_batch)
        self.ema = EMA(net, settings.ema) if settings.ema is not None else None
        self.schedule = Schedule(self.optimizer, recipe, settings.epochs * self.steps_per_epoch)
        self.log: RunLog | None = None  # on rank 0
        self.progress = Progress()
        self.best = -1.0  # AP of best.pt
        self.stale = 0  # validations since then
        self.metrics: dict[str, float] = {}  # of the last validation
        self.saved_at = time.monotonic()

    @property
    def detector(self) -> RetinaNet:
        """The model that is validated and saved: the averaged one, if there is one."""
        return self.ema.model if self.ema else self.net

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and optimizer steps of it that are done."""
        return self.progress.epoch, self.progress.step

    @property
    def is_over(self) -> bool:
        """Whether all epochs are trained, or `--early_stop` ends the run before."""
        settings = self.settings
        return self.progress.epoch >= settings.epochs or bool(settings.early_stop and self.stale >= settings.early_stop)

    def write(self, entry: dict[str, float]) -> None:
        """Add an entry to the log, on rank 0."""
        if self.log:
            self.log.write(entry)

    def after_step(self, signum: int) -> None:
        """Call after every optimizer step: update the average, save if it is time, and stop if a signal came."""
        if self.ema:
            self.ema.update(self.net)
        if signum:
            self.stop(signum)
        number, unit = self.settings.checkpoint_every
        if self.progress.step % number == 0 if unit == "steps" else time.monotonic() - self.saved_at > 60 * number:
            self.save_last()

    def end_epoch(self, statistics: dict[str, float]) -> None:
        """Call after every epoch, with the result of `train_one_epoch`; its validation has set `metrics`."""
        with undisturbed():
            self.schedule.end_epoch(statistics["loss"])
            epoch = self.progress.epoch
            self.progress = Progress(epoch + 1)
            self.write({"epoch": epoch, **statistics, **self.metrics})
            if self.metrics:
                self.stale += 1
                if self.metrics["AP"] > self.best:
                    self.best, self.stale = self.metrics["AP"], 0
                    self.save("best.pt")
            self.save_last()

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
        entries = checkpoint.model_entries(self.detector, self.class_names, settings.min_side, settings.max_side)
        entries |= {"epoch": self.progress.epoch, "metrics": self.metrics}
        checkpoint.save(Path(settings.out_dir) / name, entries | extra)

    def save_last(self) -> None:
        """Write last.pt, with all that `restore` needs to continue exactly from here."""
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
        if self.ema:
            state |= {"weights": self.net.state_dict(), "ema_steps": self.ema.steps}
        self.save("last.pt", training=state)

    def restore(self, content: dict[str, Any]) -> None:
        """Continue from what `save_last` wrote; `net` was loaded from the same file."""
        self.metrics, state = content["metrics"], content["training"]
        self.progress = Progress(**state["progress"])
        self.best, self.stale = state["best"], state["stale"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.scheduler.load_state_dict(state["schedule"])
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


def find_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint to resume, if any; the same on all ranks."""
    if settings.resume != "auto":
        return Path(settings.resume) if settings.resume else None
    path = Path(settings.out_dir) / "last.pt"
    if not path.exists() and (old := list(path.parent.glob("old_*/last.pt"))):
        newest = max(old, key=lambda path: path.stat().st_mtime)
        log.warning("warning: --resume auto finds no %s, so a new run starts; did you mean %s?", path, newest)
    return from_main_process(path if path.exists() else None)


def check_resume(path: Path, settings: Settings, content: dict[str, Any], train_set: DetectionDataset) -> None:
    """Make sure that `settings` and `train_set` are those of the run whose checkpoint `load_model` read from `path`.

    Raises:
        UserError: they are not; the message lists all differences.
    """
    if "training" not in content:
        raise UserError(f"{path}: holds a model, but no state of a training; start from it with --weights {path}")
    check_classes(str(path), content["class_names"], train_set)
    recipe = RECIPES[settings.recipe]
    before, now = content["training"]["args"], settings.as_dict()
    before = {**before, "clip_norm": before.get("clip_norm") or recipe.clip_norm}  # earlier versions saved the flag
    free = FREE_FLAGS | ({"epochs"} if recipe.schedule == "plateau" else set())
    names = {"global_batch": "batch_size x --accumulate x processes"}
    errors = [
        f"--{names.get(flag, flag)} is {now[flag]}, was {before[flag]}"
        for flag in sorted(now.keys() & before.keys() - free)
        if now[flag] != before[flag]
    ]
    if len(train_set) != content["training"]["num_images"]:
        errors.append(f"the training set has {len(train_set)} images, had {content['training']['num_images']}")
    if errors:
        advice = "Repeat the flags of that run, or start a new one with --weights"
        raise UserError(f"--resume {path}: {'; '.join(errors)}. {advice}")
