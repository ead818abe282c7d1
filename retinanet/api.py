"""`retinanet.train` and `retinanet.validate`: what train.py and validate.py do, for programs and notebooks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

import torch

from retinanet import detection, inference, process
from retinanet.data.checks import write_skipped
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import make_loader, transformed
from retinanet.errors import UserError, shown
from retinanet.evaluation import coco, report
from retinanet.model import RetinaNet
from retinanet.process import log, optional
from retinanet.results import check_csv, write_csv, write_page
from retinanet.running import run_training
from retinanet.training import checkpoint
from retinanet.training.checkpoint import LIMITS
from retinanet.training.files import make_out_dir
from retinanet.training.log import read_log
from retinanet.training.run import Run
from retinanet.training.settings import AUGMENTATIONS, Settings, as_flags, check_settings
from retinanet.training.weights import match_classes
from retinanet.visual import charts


@dataclass(frozen=True)
class TrainResult:
    """The files and scores of a finished run."""

    out_dir: Path
    best: Path | None  # best.pt; None without a validation set
    last: Path  # last.pt
    log: Path  # log.jsonl
    metrics: dict[str, float]  # COCO's numbers of `best`; empty without a validation set
    last_metrics: dict[str, float]  # COCO's numbers of the last validation

    @cached_property
    def model(self) -> RetinaNet:
        """The detector from `best`, or from `last` if `best` is None, on the CPU, in evaluation mode."""
        return checkpoint.load_model(self.best or self.last)[0]


def train(
    train_set: DetectionDataset,
    val_set: DetectionDataset | None = None,
    *,
    on_log: Callable[[dict[str, float]], object] | None = None,
    on_validation: Callable[[dict[str, float]], object] | None = None,
    **settings: Any,
) -> TrainResult:
    """Train a detector, as train.py does.

    On SIGTERM, Ctrl-C and similar signals, the step is finished, the run is saved, and SystemExit is raised;
    `resume="auto"` then continues the run. A second Ctrl-C raises KeyboardInterrupt at once. Under torchrun, every
    process must call this function. It seeds the random generators of Python, NumPy and torch.

    Args:
        train_set: of any format; if it has no transform, that of the settings is used during this training.
        val_set: likewise, but only resized; None trains without validation.
        on_log: called on rank 0 with each entry of log.jsonl: some are of steps, the others, without `step`, of epochs.
        on_validation: called on rank 0 with `epoch` and COCO's numbers after each validation.
        **settings: the flags of train.py, under the same names and with the same defaults: the fields of
            `retinanet.training.settings.Settings`.

    Raises:
        UserError: a setting or the data is wrong; the message lists all errors.
    """
    _check_dataset("train_set", train_set)
    if val_set is not None:
        _check_dataset("val_set", val_set)
    for name, call in (("on_log", on_log), ("on_validation", on_validation)):
        if call is not None and not callable(call):
            raise UserError(f"{name} must be callable with a dict, not {shown(call)}")
    given = [name for name in AUGMENTATIONS if settings.get(name) is not None]
    if train_set.transform is not None and given:
        raise UserError(f"train_set has its own transform, so {', '.join(given)} would have no effect; give only one")
    settings = check_settings(settings, val_set is not None)
    device = process.choose_device(settings.get("device", "auto"))
    process.init_distributed(device)
    process.show_log()
    resolved = Settings.resolve(settings, device)
    run = run_training(resolved, device, train_set, val_set, on_log, on_validation, in_program=True)
    return _result(run)


def _result(run: Run) -> TrainResult:
    """The result of a finished run, from the files in its folder; the same on all ranks."""
    out_dir, found = Path(run.settings.out_dir), None
    if process.is_main_process():
        scores = [entry for entry in read_log(out_dir / "log.jsonl") if "AP" in entry]
        best = max(scores, key=lambda entry: entry["AP"], default={})
        found = (out_dir / "best.pt").exists(), best
    has_best, best = process.from_main_process(found)
    return TrainResult(
        out_dir,
        best=out_dir / "best.pt" if has_best else None,
        last=out_dir / "last.pt",
        log=out_dir / "log.jsonl",
        metrics={name: best[name] for name in coco.metric_names(run.settings.max_detections) if name in best},
        last_metrics=run.metrics,
    )


def _check_dataset(name: str, dataset: DetectionDataset) -> None:
    if not isinstance(dataset, DetectionDataset):
        raise UserError(f"{name} must be a DetectionDataset, such as CSVDataset, not {type(dataset).__name__}")
    if not len(dataset):
        raise UserError(f"{name} has no images")


def validate(
    model: str | Path | RetinaNet | tuple[RetinaNet, dict[str, Any]],
    dataset: DetectionDataset,
    *,
    out: str | Path | None = None,
    iou_threshold: float = 0.5,
    min_precision: float | None = None,
    voc07: bool = False,
    analyse: bool = False,
    limit: int | None = None,
    batch_size: int = 4,
    workers: int = 2,
    device: str = "auto",
    precision: str = "auto",
    score_threshold: float | None = None,
    nms_threshold: float | None = None,
    top_k: int | None = None,
    max_detections: int | None = None,
    tile: int | None = None,
    tile_overlap: float | None = None,
    save_csv: str | Path | None = None,
) -> dict[str, Any]:
    """Score a detector, as validate.py does; under torchrun, all processes share the work.

    Args:
        model: the path of a checkpoint, the result of `checkpoint.load_model`, or a model with the data set's classes.
        dataset: if it has no transform, its images are resized as in the model's training.
        out: folder for detections.json, metrics.json, report.html and charts.
        iou_threshold: smallest IoU at which a box counts as found, for VOC's scores.
        min_precision: also find the lowest scores that have this precision.
        voc07: compute VOC's mAP from 11 points instead of the area under the curve.
        analyse: also find out how much AP each kind of error costs (TIDE).
        limit: number of images, from the first one; by default all.
        batch_size: images per batch.
        workers: number of processes that read images.
        device: as `--device`.
        precision: as `--precision`.
        score_threshold, nms_threshold, top_k, max_detections: as in `RetinaNet.detect`; by default those of the model.
        tile, tile_overlap: as in `retinanet.predict`, with 0 for no tiles; by default those of the model.
        save_csv: file to write one line per detection to, see `write_csv`.

    Returns:
        The content of metrics.json: COCO's numbers by name (`AP`, `AP50`, ...), `mAP`, `classes`, ...

    Raises:
        UserError: the checkpoint cannot be read, its classes are not the data set's, or an argument is wrong.
    """
    _check_dataset("dataset", dataset)
    given = dict(zip(LIMITS, (score_threshold, nms_threshold, top_k, max_detections), strict=True))
    how = {"iou_threshold": iou_threshold, "voc07": voc07, "analyse": analyse, "min_precision": min_precision}
    machine = {"limit": limit, "batch_size": batch_size, "workers": workers, "device": device, "precision": precision}
    as_flags({**given, **how, **machine, "out": out, "save_csv": save_csv}, get_type_hints(validate))
    given = {name: value for name, value in given.items() if value is not None}
    chosen = process.choose_device(str(device))
    process.init_distributed(chosen)
    process.show_log()
    if out is not None:
        report.check_folder(make_out_dir(str(out)))
    if save_csv is not None:
        check_csv(save_csv)
    net, info = inference.open_model(model)
    info = {"class_names": list(dataset.labels.values()), **info}
    net, info = match_classes(info.get("path", "the model"), net, info, dataset)
    if net.num_classes != dataset.num_classes():
        raise UserError(f"the model has {net.num_classes} classes, but {dataset.source} has {dataset.num_classes()}")
    limits = inference.detection_limits(info, given)
    tiles = {"tile": tile, "tile_overlap": tile_overlap}
    tiling = inference.choose_tiling(info, {name: value for name, value in tiles.items() if value is not None})
    with transformed(dataset, inference.make_resizer(info)), dataset.scaled(info.get("pixel_range")):
        indices = None if limit is None else range(len(dataset))[:limit]
        loader = make_loader(dataset, batch_size, workers, indices=indices, device=chosen, tiling=tiling)
        net.to(chosen, memory_format=torch.channels_last)
        found = detection.detect(net, loader, chosen, process.choose_precision(precision, chosen), **limits)
    metrics = None
    if process.is_main_process():
        log.info("detections with scores above %g:", limits["score_threshold"])
        counted = {"limit": limits["max_detections"], "min_precision": min_precision}
        evaluation = report.Evaluation(dataset, found, iou_threshold, voc07, analyse, **counted)
        metrics = report_scores(evaluation, out, info.get("path", "model"), (net, info), save_csv)
    return process.from_main_process(metrics)


def report_scores(
    evaluation: report.Evaluation,
    out: str | Path | None,
    source: str,
    model: tuple[RetinaNet, dict[str, Any]] | None = None,
    save_csv: str | Path | None = None,
) -> dict[str, Any]:
    """Log the scores, and write files to `out` and `save_csv` if they are given; returns the content of metrics.json.

    `source` and `model` are passed to `write_page`.
    """
    dataset, found, folder = evaluation.dataset, evaluation.detections, out and Path(out)
    write_skipped(folder, [dataset])
    if save_csv:
        rows = [(dataset.image_path(index), found[index]) for index in sorted(found)]
        write_csv(save_csv, rows, list(dataset.labels.values()))
    log.info("%s", evaluation.text())
    if folder:
        evaluation.write(folder)
        curves = {f"IoU {iou}": evaluation.coco.curves(row) for iou, row in (("0.50", 0), ("0.75", 5))}
        with optional("pr_curves.png"):
            charts.draw_curves(curves, folder / "pr_curves.png")
        with optional("thresholds.png"):
            evaluation.draw_thresholds(folder / "thresholds.png")
        with optional("report.html"):
            write_page(folder / "report.html", evaluation, source, model)
        log.info("\nwritten to %s: %s", folder, ", ".join(sorted(path.name for path in folder.iterdir())))
    return evaluation.metrics()
