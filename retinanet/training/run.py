"""A training run: what a checkpoint of it holds, how it goes on from one, and what it writes down on its way."""

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from retinanet.data.dataset import DetectionDataset, check_classes
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.process import from_main_process, is_main_process, log, random_states, set_random_states
from retinanet.training import checkpoint
from retinanet.training.engine import Progress
from retinanet.training.recipes import EMA, RECIPES, Schedule
from retinanet.visual import charts

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Flags that may change when a run is resumed. The batch's size may be divided in another way; `global_batch` may not.
FREE_FLAGS = {
    *("resume", "out_dir", "device", "workers", "strict", "batch_size", "accumulate", "val_every", "log_every"),
    *("checkpoint_every", "early_stop", "tensorboard"),
    *("coco_path", "voc_path", "yolo_path", "csv_train", "csv_val", "csv_classes"),
}


BOARD_FILES = "events.out.tfevents.*"
RUN_FILES = (
    *("last.pt", "best.pt", "log.jsonl", "args.json", "curves.png", "labels.png", "batch.png", "detections.png"),
    *("not_finite_rank*.pt", BOARD_FILES),
)


class RunLog:
    """The numbers of a run, one JSON object a line: of some steps, and of each epoch.

    A new run in a folder of an earlier one puts its files aside, into `old_1`, `old_2`, ...

    Args:
        out_dir: folder of the run.
        resumed: the checkpoint that the run goes on from, whose log lies beside it; None for a new run.
        size: bytes of that log that belong to the checkpoint: what came later is not true any more.
        tensorboard: write TensorBoard's files as well.
        steps_per_epoch: optimizer steps.

    Raises:
        UserError: TensorBoard is wanted, but not installed.
    """

    def __init__(self, out_dir: str | Path, resumed: Path | None, size: int, tensorboard: bool, steps_per_epoch: int):
        self.folder = Path(out_dir)
        self.path = self.folder / "log.jsonl"
        self.steps_per_epoch = steps_per_epoch
        self.can_draw = True
        make_board = _summary_writer() if tensorboard else None
        if resumed is None:
            self._put_aside()
        else:
            self._take_over(resumed.parent, size)
        mode = "w" if resumed is None else "a"
        self.file = open(self.path, mode, buffering=1)  # noqa: SIM115, it stays open for the whole run
        self.board = None
        if make_board:
            for old in self.folder.glob(BOARD_FILES):
                old.unlink()
            self.board = make_board(self.folder)
            for entry in read_log(self.path):  # written anew, so that a resumed run shows nothing twice
                _add_to_board(self.board, entry, steps_per_epoch)

    def _put_aside(self) -> None:
        said_something = self.path.exists() and self.path.stat().st_size > 0
        if not (said_something or any((self.folder / name).exists() for name in ("last.pt", "best.pt"))):
            return
        number = next(number for number in itertools.count(1) if not (self.folder / f"old_{number}").exists())
        aside = self.folder / f"old_{number}"
        aside.mkdir()
        for pattern in RUN_FILES:
            for path in self.folder.glob(pattern):
                path.replace(aside / path.name)
        log.warning("warning: %s held an earlier run, which is in %s now", self.folder, aside)

    def _take_over(self, folder: Path, size: int) -> None:
        best, before = folder / "best.pt", folder / "log.jsonl"
        if not self.folder.samefile(folder):
            self._put_aside()
            if best.exists():
                shutil.copyfile(best, self.folder / "best.pt")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(before.read_bytes()[:size] if before.exists() else b"")
        temporary.replace(self.path)

    def write(self, entry: dict[str, float]) -> None:
        """Add a line.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self.file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); last.pt is intact") from error
        if self.board:
            _add_to_board(self.board, entry, self.steps_per_epoch)
            self.board.flush()

    def flush(self) -> int:
        """Write all to the disk; returns the log's size, bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def draw(self) -> None:
        """Refresh curves.png; without matplotlib, say so once."""
        if not self.can_draw:
            return
        try:
            charts.draw_training_curves(read_log(self.path), self.steps_per_epoch, self.folder / "curves.png")
        except UserError as error:
            log.warning("warning: no curves.png: %s", error)
            self.can_draw = False


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The entries of a log.jsonl; a last line that is not whole, of a run that is being written, is left out."""
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _summary_writer() -> type["SummaryWriter"]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter


def _add_to_board(board: "SummaryWriter", entry: Mapping[str, float], steps_per_epoch: int) -> None:
    kind = "step" if "step" in entry else "epoch"
    step = entry["epoch"] * steps_per_epoch + entry.get("step", steps_per_epoch)
    for name in entry.keys() - {"epoch", "step"}:
        board.add_scalar(f"{kind}/{name}", entry[name], step)


@dataclass
class Run:
    """A training run: what changes while it goes on, and what a checkpoint of it holds.

    Attributes:
        args: the flags of train.py.
        net: in training.
        ema: its averaged weights, with `--ema`.
        optimizer: of its weights.
        schedule: of the optimizer's rate.
        class_names: in the order of their labels.
        num_images: of the training set.
        log: where numbers are written to; on rank 0 alone.
        progress: how far it has come.
        best: AP of best.pt.
        stale: validations since then.
        metrics: of the last validation.
        saved_at: when last.pt was written or the run was started, by `time.monotonic`.
    """

    args: argparse.Namespace
    net: RetinaNet
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    class_names: list[str]
    num_images: int
    log: RunLog | None = None
    progress: Progress = field(default_factory=Progress)
    best: float = -1.0
    stale: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def detector(self) -> RetinaNet:
        """The model that is validated and saved: the averaged one, if there is one."""
        return self.ema.model if self.ema else self.net

    def save(self, name: str, **extra: Any) -> None:
        """Write a checkpoint, on rank 0 alone.

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
        entries = checkpoint.model_entries(self.detector, self.class_names, self.args.min_side, self.args.max_side)
        entries |= {"epoch": self.progress.epoch, "metrics": self.metrics}
        checkpoint.save(Path(self.args.out_dir) / name, entries | extra)

    def save_last(self) -> None:
        """Write last.pt: all that `restore` needs to go on exactly from here."""
        state = {
            "args": vars(self.args),
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
        """Go on from what `save_last` wrote; the detector's weights are there already."""
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
        """Save, and end the program with the status of a signal; all ranks together."""
        self.save_last()
        from_main_process(None)  # torchrun ends all ranks as soon as one has gone: wait until it is written
        log.info("stopped and saved in epoch %d, after step %d; --resume auto goes on", *self.position)
        raise SystemExit(128 + signum)

    @property
    def position(self) -> tuple[int, int]:
        """Epoch and step."""
        return self.progress.epoch, self.progress.step


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from, if any; the same for all ranks."""
    path = Path(args.out_dir) / "last.pt" if args.resume == "auto" else Path(args.resume or "")
    if args.resume == "auto" and not path.exists() and (old := list(path.parent.glob("old_*/last.pt"))):
        newest = max(old, key=lambda path: path.stat().st_mtime)
        log.warning("warning: --resume auto finds no %s, so a new run starts; is it %s?", path, newest)
    return from_main_process(path if args.resume and (args.resume != "auto" or path.exists()) else None)


def check_resume(path: Path, args: argparse.Namespace, info: dict[str, Any], train_set: DetectionDataset) -> None:
    """Make sure that a run can go on as it began.

    Raises:
        UserError: it cannot; the message lists all that differs.
    """
    if "training" not in info:
        raise UserError(f"{path}: holds a model, but no state of a training; start from it with --weights {path}")
    check_classes(str(path), info["class_names"], train_set)
    before, now = info["training"]["args"], vars(args)
    free = FREE_FLAGS | ({"epochs"} if RECIPES[args.recipe].schedule == "plateau" else set())
    errors = [
        f"--{flag} is {now[flag]}, was {before[flag]}"
        for flag in sorted(now.keys() & before.keys() - free)
        if now[flag] != before[flag]
    ]
    errors = [line.replace("--global_batch", "--batch_size x --accumulate x processes") for line in errors]
    if len(train_set) != info["training"]["num_images"]:
        errors.append(f"the training set has {len(train_set)} images, had {info['training']['num_images']}")
    if errors:
        advice = "Repeat the flags of that run, or start a new one with --weights"
        raise UserError(f"--resume {path}: {'; '.join(errors)}. {advice}")
