"""report.html with what belongs to its detector: the reach of its anchors, and the training that it comes from."""

import contextlib
from pathlib import Path
from typing import Any

from retinanet.errors import UserError
from retinanet.evaluation import web_report
from retinanet.evaluation.report import Evaluation
from retinanet.model import RetinaNet
from retinanet.training.log import read_log
from retinanet.visual import anchor_fit, anchor_report


def write_page(path: Path, evaluation: Evaluation, source: str, model: tuple[RetinaNet, dict[str, Any]] | None) -> None:
    """Write report.html and its images, see `web_report.write`.

    Args:
        path: of report.html.
        evaluation: detections and their scores.
        source: the file of the detector or of the detections, for the head; a log.jsonl beside it is that of the run.
        model: the result of `checkpoint.load_model`; None if only the detections are known.
    """
    log_file, training, anchors = Path(source).with_name("log.jsonl"), [], None
    if model:
        net, info = model
        sides = (None, None) if info.get("tile") else (info.get("min_side", 608), info.get("max_side", 1024))
        with contextlib.suppress(UserError, OSError):  # an image is gone
            fit = anchor_fit.measure(evaluation.scored, net.anchors, *sides, info.get("best_match_iou"))
            coverage = anchor_report.as_dict(fit, fit, evaluation.scored)["coverage"] if len(fit.iou) else {}
            anchors = {"summary": anchor_report.summary(fit), "coverage": coverage}
        training = read_log(log_file) if log_file.is_file() else []
    web_report.write(path, evaluation, source, model is not None, training, anchors)
