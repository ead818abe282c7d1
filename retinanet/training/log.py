"""The log of a run: log.jsonl, and TensorBoard's files beside it."""

import itertools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from retinanet.data.reading import read_bytes
from retinanet.errors import UserError, output_file
from retinanet.process import log
from retinanet.training.files import lock_folder, replaced

BOARD_FILES = "events.out.tfevents.*"
BOARD_SIDE = 1280  # long side of TensorBoard's images, pixels: one is kept for each validation
RUN_FILES = (
    *("last.pt", "best.pt", "log.jsonl", "log_damaged.jsonl", "args.json", "not_finite_rank*.pt", BOARD_FILES),
    *("curves.png", "labels.png", "batch.png", "detections.png", "report.html", "report"),
)


class RunLog:
    """The log of a run: one JSON object per line, for some of the steps and for each epoch.

    It locks the folder. If the folder holds an earlier run, its files are moved to `old_1`, `old_2`, ... A run that
    continues from the checkpoint `resumed` keeps the first `size` bytes of the log beside it.

    Raises:
        UserError: another program writes to the folder, or `tensorboard` is True but TensorBoard is not installed.
    """

    def __init__(self, out_dir: str | Path, resumed: Path | None, size: int, tensorboard: bool, steps_per_epoch: int):
        self.folder = Path(out_dir)
        self.path = self.folder / "log.jsonl"
        self.steps_per_epoch = steps_per_epoch
        if tensorboard:  # imported before any file is moved
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise UserError("--tensorboard needs tensorboard: pip install tensorboard") from error
        self.lock = lock_folder(self.folder)
        if resumed is None:
            _put_aside(self.folder)
        else:
            self._continue_from(resumed.parent, size)
        self.file = open(output_file(self.path), "w" if resumed is None else "a", buffering=1)  # noqa: SIM115
        self.board = None
        if tensorboard:
            for old in self.folder.glob(BOARD_FILES):
                old.unlink()
            self.board = SummaryWriter(self.folder)
            for entry in read_log(self.path):  # all are written again, so that no entry of a resumed run appears twice
                self._add_to_board(entry)

    def _continue_from(self, folder: Path, size: int) -> None:
        best, before = folder / "best.pt", folder / "log.jsonl"
        if not self.folder.samefile(folder):
            _put_aside(self.folder)
            if best.is_file():
                with open(best, "rb") as source, replaced(self.folder / "best.pt") as file:
                    shutil.copyfileobj(source, file)
        content = read_bytes(before)[:size] if before.is_file() else b""
        entries = b"".join(line for line in content.splitlines(keepends=True) if _entry(line))
        if len(entries) < size:
            aside = self.folder / "log_damaged.jsonl"
            log.warning("warning: %s is damaged: a copy is in %s; only its readable lines are kept", before, aside)
            with replaced(aside) as file:
                file.write(content)
        with replaced(self.path) as file:
            file.write(entries)

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

    def add_pictures(self, epoch: int, sheet: Path, curves: Mapping[str, np.ndarray]) -> None:
        """Add a validation to TensorBoard, if it is used: the image file `sheet` of its detections, and its curves.

        The curve of each name is [5, T]: right, false and missed objects, precision and recall above T scores, which
        rise from 0 to 1 in equal steps.
        """
        if not self.board:
            return
        step = (epoch + 1) * self.steps_per_epoch
        if sheet.is_file():
            with Image.open(sheet) as image:
                image.thumbnail((BOARD_SIDE, BOARD_SIDE))
                self.board.add_image("detections", np.asarray(image), step, dataformats="HWC")
        for name, (right, false, missed, *rates) in curves.items():
            counts = right, false, np.zeros_like(right), missed  # detection has no true negatives
            self.board.add_pr_curve_raw(f"PR/{name}", *counts, *rates, step, num_thresholds=len(right))
        self.board.flush()

    def close(self) -> None:
        """Close the files, so that another run may use the folder."""
        for file in (self.file, self.board, self.lock):
            if file:
                file.close()

    def flush(self) -> int:
        """Write all entries to the disk; returns the log's size, bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The entries of a log.jsonl, without lines that are damaged or that a running program has not finished."""
    return [entry for line in read_bytes(path).splitlines(keepends=True) if (entry := _entry(line))]


def _entry(line: bytes) -> dict[str, float] | None:
    """The entry in a line; None if it is not a valid one."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    fits = isinstance(entry, dict) and all(isinstance(value, int | float) for value in entry.values())
    return entry if fits and isinstance(entry.get("epoch"), int) else None


def _put_aside(folder: Path) -> None:
    """Move the files of an earlier run, if it saved or logged anything, to a folder `old_1`, `old_2`, ..."""
    log_file = folder / "log.jsonl"
    has_entries = log_file.exists() and log_file.stat().st_size > 0
    if not (has_entries or any((folder / name).exists() for name in ("last.pt", "best.pt"))):
        return
    aside = next(path for number in itertools.count(1) if not (path := folder / f"old_{number}").exists())
    aside.mkdir()
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.replace(aside / path.name)
    log.warning("warning: %s held an earlier run, whose files are now in %s", folder, aside)
