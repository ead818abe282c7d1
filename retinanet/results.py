"""Files with results: CSV tables for spreadsheets and geographic information systems, and report.html."""

import contextlib
import csv
import io
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from retinanet.errors import UserError, output_file
from retinanet.evaluation import web_report
from retinanet.evaluation.report import Evaluation
from retinanet.model import RetinaNet
from retinanet.postprocess import Detections
from retinanet.training.files import replaced
from retinanet.training.log import read_log
from retinanet.visual import anchor_fit, anchor_report

COLUMNS = ("file", "class", "score", "x1", "y1", "x2", "y2")


def counts_path(path: str | Path) -> Path:
    """The second file of `--save_csv`: for trees.csv, trees_counts.csv beside it."""
    return Path(path).with_name(f"{Path(path).stem}_counts{Path(path).suffix}")


def check_csv(path: str | Path) -> None:
    """Create the folder of `--save_csv`, before anything is computed.

    A UserError if no file can be written there, or if it exists and is not from `write_csv`: annotations, for example.
    """
    for file in map(output_file, (path, counts_path(path))):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise UserError(f"--save_csv {file}: nothing can be written there ({error.strerror})") from error
        if file.exists():
            with open(file, "rb") as content:
                start = content.read(5)
            if start not in (b"", b"file,"):
                raise UserError(f"--save_csv {file}: exists and holds something else; choose another name")


def write_csv(path: str | Path, found: Iterable[tuple[str, Detections]], class_names: Sequence[str]) -> None:
    """Write a line for each detection to `path`, and a line for each image, even without detections, to `counts_path`.

    `found` holds the file of each image and its detections, boxes in pixels of the image. If a table cannot be written,
    it is a UserError, and an earlier file stays intact.
    """
    lines: list[Sequence[Any]] = [COLUMNS]
    counts: list[Sequence[Any]] = [("file", *class_names, "all")]
    for file, (scores, labels, boxes) in found:
        for score, label, box in zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True):
            lines.append((file, class_names[label], round(score, 6), *(round(value, 2) for value in box)))
        numbers = labels.bincount(minlength=len(class_names)).tolist()
        counts.append((file, *numbers, len(labels)))
    for target, rows in ((Path(path), lines), (counts_path(path), counts)):
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        with replaced(target) as content:
            content.write(text.getvalue().encode("utf-8", "surrogateescape"))


def write_page(path: Path, evaluation: Evaluation, source: str, model: tuple[RetinaNet, dict[str, Any]] | None) -> None:
    """Write report.html and its images, see `web_report.write`.

    `model` is the result of `checkpoint.load_model`, and `source` its file; a log.jsonl beside it is taken for the
    log of its run. Without a `model`, `source` is the file of the detections.
    """
    log_file, training, anchors = Path(source).with_name("log.jsonl"), [], None
    if model:
        net, info = model
        sides = (None, None) if info.get("tile") else (info.get("min_side", 608), info.get("max_side", 1024))
        with contextlib.suppress(UserError, OSError):  # an image may be missing
            fit = anchor_fit.measure(evaluation.scored, net.anchors, *sides, info.get("best_match_iou"))
            coverage = anchor_report.as_dict(fit, fit, evaluation.scored)["coverage"] if len(fit.iou) else {}
            anchors = {"summary": anchor_report.summary(fit), "coverage": coverage}
        training = read_log(log_file) if log_file.is_file() else []
    web_report.write(path, evaluation, source, model is not None, training, anchors)
