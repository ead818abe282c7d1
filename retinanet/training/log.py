"""The log of a run: log.jsonl, and TensorBoard's files beside it."""

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.errors import UserError
from retinanet.process import log

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

BOARD_FILES = "events.out.tfevents.*"
RUN_FILES = (
    *("last.pt", "best.pt", "log.jsonl", "args.json", "curves.png", "labels.png", "batch.png", "detections.png"),
    *("not_finite_rank*.pt", BOARD_FILES),
)


class RunLog:
    """The numbers of a run, one JSON object a line: of some steps, and of each epoch.

    If the folder holds an earlier run, that run's files are moved to `old_1`, `old_2`, ...

    Args:
        out_dir: folder of the run.
        resumed: the checkpoint that is resumed, with its log beside it; None for a new run.
        size: length of that log when the checkpoint was written, bytes; the rest is dropped.
        tensorboard: write TensorBoard's files as well.
        steps_per_epoch: optimizer steps.

    Raises:
        UserError: TensorBoard is asked for, but not installed.
    """

    def __init__(self, out_dir: str | Path, resumed: Path | None, size: int, tensorboard: bool, steps_per_epoch: int):
        self.folder = Path(out_dir)
        self.path = self.folder / "log.jsonl"
        self.steps_per_epoch = steps_per_epoch
        make_board = _summary_writer() if tensorboard else None  # before any file is moved
        if resumed is None:
            _put_aside(self.folder)
        else:
            self._continue_from(resumed.parent, size)
        self.file = open(self.path, "w" if resumed is None else "a", buffering=1)  # noqa: SIM115, open until the end
        self.board = None
        if make_board:
            for old in self.folder.glob(BOARD_FILES):
                old.unlink()
            self.board = make_board(self.folder)
            for entry in read_log(self.path):  # written again, so that a resumed run shows no entry twice
                self._add_to_board(entry)

    def _continue_from(self, folder: Path, size: int) -> None:
        best, before = folder / "best.pt", folder / "log.jsonl"
        if not self.folder.samefile(folder):
            _put_aside(self.folder)
            if best.exists():
                shutil.copyfile(best, self.folder / "best.pt")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(before.read_bytes()[:size] if before.exists() else b"")
        temporary.replace(self.path)

    def _add_to_board(self, entry: Mapping[str, float]) -> None:
        kind = "step" if "step" in entry else "epoch"
        step = entry["epoch"] * self.steps_per_epoch + entry.get("step", self.steps_per_epoch)
        for name in entry.keys() - {"epoch", "step"}:
            self.board.add_scalar(f"{kind}/{name}", entry[name], step)

    def write(self, entry: Mapping[str, float]) -> None:
        """Add an entry; a UserError if it cannot be written."""
        try:
            self.file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); last.pt is intact") from error
        if self.board:
            self._add_to_board(entry)
            self.board.flush()

    def flush(self) -> int:
        """Write all entries to the disk; returns the log's size, bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The entries of a log.jsonl, without a last line that a running program has not finished yet."""
    lines = Path(path).read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _put_aside(folder: Path) -> None:
    """Move an earlier run's files out of the way, if it saved or logged anything."""
    log_file = folder / "log.jsonl"
    has_entries = log_file.exists() and log_file.stat().st_size > 0
    if not (has_entries or any((folder / name).exists() for name in ("last.pt", "best.pt"))):
        return
    aside = next(path for number in itertools.count(1) if not (path := folder / f"old_{number}").exists())
    aside.mkdir()
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.replace(aside / path.name)
    log.warning("warning: %s held an earlier run, which is in %s now", folder, aside)


def _summary_writer() -> type["SummaryWriter"]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from error
    return SummaryWriter
