"""Score a detector: COCO's twelve numbers, each class, and where the AP goes."""

import argparse
import json
import sys
from pathlib import Path

import torch

from retinanet import inference, process
from retinanet.commands import flags
from retinanet.data.dataset import DetectionDataset, check_classes
from retinanet.data.loader import make_loader
from retinanet.data.transforms import Resizer
from retinanet.evaluation import coco as coco_eval
from retinanet.evaluation import errors as error_analysis
from retinanet.evaluation import voc as csv_eval
from retinanet.postprocess import Detections
from retinanet.process import log, script
from retinanet.training.checkpoint import load_model
from retinanet.visual import charts


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error exits with 2."""
    parser = flags.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint, such as best.pt")
    source.add_argument("--detections", help="COCO results file of any detector, in place of a model")
    flags.add_data_arguments(parser, training=False)
    flags.add_detection_arguments(parser, score_threshold=0.05)
    flags.add_machine_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--limit", type=flags.positive_int, help="only the first so many images")
    group.add_argument(
        "--iou_threshold", type=flags.fraction, default=0.5, help="IoU from which a box counts as found, for VOC's mAP"
    )
    group.add_argument("--voc07", action="store_true", help="VOC's mAP by 11 points, in place of the whole area")
    group.add_argument("--analyse", action="store_true", help="what kinds of errors cost how much AP (TIDE)")
    group.add_argument("--out", help="folder for detections.json, metrics.json and pictures")
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_val"])
    changed = [
        flag for flag in ("score_threshold", "max_detections") if getattr(args, flag) != parser.get_default(flag)
    ]
    if args.detections and changed:
        errors.append(f"--detections takes the file as it stands, without --{' and --'.join(changed)}")
    if errors:
        parser.error("; ".join(errors))
    return args


def run_model(args: argparse.Namespace) -> tuple[DetectionDataset, dict[int, Detections]]:
    """The data set, and the detections of its images by the model; under torchrun, by all processes together."""
    device = process.choose_device(args.device)
    process.init_distributed(device)
    net, info = load_model(args.model)
    dataset = flags.make_dataset(args, "val", Resizer(info["min_side"], info["max_side"]))
    check_classes(args.model, info["class_names"], dataset)
    indices = None if args.limit is None else range(len(dataset))[: args.limit]
    loader = make_loader(dataset, args.batch_size, args.workers, indices=indices, device=device)
    net.to(device, memory_format=torch.channels_last)
    precision = process.choose_precision(args.precision, device)
    limits = {"score_threshold": args.score_threshold, "max_detections": args.max_detections}
    return dataset, inference.detect(net, loader, device, precision, **limits)


def read_detections(args: argparse.Namespace) -> tuple[DetectionDataset, dict[int, Detections]]:
    """The data set, and the detections of its images from a results file; no picture is opened."""
    dataset = flags.make_dataset(args, "val", None)
    results = coco_eval.read_results(args.detections, coco_eval.ground_truth(dataset))
    found = coco_eval.detections_of(dataset, results)
    return dataset, {index: found[index] for index in range(len(dataset))[: args.limit]}


def write_json(content: object, path: Path) -> None:
    """Write a JSON file for people and programs."""
    path.write_text(json.dumps(content, indent=1))


@script
def main(argv: list[str] | None = None) -> None:
    """Evaluate as the flags say."""
    args = parse_arguments(argv)
    process.setup_logging()
    dataset, found = run_model(args) if args.model else read_detections(args)
    if not process.is_main_process():
        return
    results = coco_eval.coco_results(dataset, found)
    scores = coco_eval.score(
        coco_eval.ground_truth(dataset), results, [dataset.image_ids[index] for index in sorted(found)]
    )
    voc = csv_eval.evaluate_detections(dataset, found, args.iou_threshold, args.voc07)
    log.info("%d images, %d detections\n%s", len(found), len(results), coco_eval.metrics_table(scores.metrics))
    log.info("\n%s", coco_eval.class_table(scores.classes))
    log.info(
        "\nat IoU %g%s:\n%s", args.iou_threshold, f", for scores above {args.score_threshold:g}" if args.model else "",
        csv_eval.class_table(voc, dataset),
    )  # fmt: skip
    analysis = error_analysis.analyse(dataset, found) if args.analyse else None
    if analysis:
        log.info(
            "\n%s\n%s",
            error_analysis.error_table(analysis),
            error_analysis.confusion_table(analysis, list(dataset.classes)),
        )
    if args.out:
        write_files(flags.make_out_dir(args.out), dataset, results, scores, voc, analysis)


def write_files(
    folder: Path,
    dataset: DetectionDataset,
    results: list[dict],
    scores: coco_eval.Scores,
    voc: dict[int, csv_eval.ClassResult],
    analysis: error_analysis.ErrorAnalysis | None,
) -> None:
    """Write detections, numbers and pictures."""
    write_json(results, folder / "detections.json")
    metrics = {**scores.metrics, "mAP": csv_eval.mean_average_precision(voc)}
    classes = [
        {**row._asdict(), "VOC_AP": result.average_precision, "precision": result.precision, "recall": result.recall}
        for row, result in zip(scores.classes, voc.values(), strict=True)
    ]
    content = {**metrics, "classes": classes}
    if analysis:
        content["errors"] = {"AP50": analysis.ap50, "counts": analysis.counts, "lost_AP": analysis.lost}
        content["confusion"] = analysis.confusion.tolist()
    write_json(content, folder / "metrics.json")
    charts.draw_curves(
        {f"IoU {iou}": coco_eval.recall_precision(scores, row) for iou, row in (("0.50", 0), ("0.75", 5))},
        folder / "pr_curves.png",
    )
    if analysis:
        charts.draw_bars(analysis.lost, "AP50 lost to each kind of error", folder / "errors.png")
        title = f"detections with scores above {error_analysis.CONFUSION_SCORE}"
        charts.draw_matrix(analysis.confusion, [*dataset.classes, "background"], title, folder / "confusion.png")
    log.info("\nwritten to %s: %s", folder, ", ".join(sorted(path.name for path in folder.iterdir())))


if __name__ == "__main__":
    sys.exit(main())
