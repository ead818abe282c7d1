"""Score a detector: COCO's twelve numbers, each class's scores, and what costs AP."""

import argparse
import sys
from functools import partial
from typing import Any

import torch

from retinanet import inference, process
from retinanet.commands import flags
from retinanet.data.checks import write_skipped
from retinanet.data.classes import check_classes
from retinanet.data.dataset import DetectionDataset
from retinanet.data.loader import make_loader
from retinanet.data.transforms import Resizer
from retinanet.evaluation import coco, report
from retinanet.evaluation.errors import CONFUSION_SCORE
from retinanet.postprocess import Detections
from retinanet.process import log, script
from retinanet.training.checkpoint import LIMITS, load_model
from retinanet.visual import charts


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; a usage error lists all contradictions and exits with 2."""
    parser = flags.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint, such as best.pt")
    source.add_argument("--detections", help="COCO results file of any detector, in place of a model")
    flags.add_data_arguments(parser, training=False)
    flags.add_detection_arguments(parser)
    flags.add_machine_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--batch_size", type=flags.positive_int, default=4, help=f"images a batch {flags.DEFAULT}")
    group.add_argument("--limit", type=flags.positive_int, help="number of images, from the first one (default: all)")
    text = f"IoU from which a box counts as found, for VOC's scores {flags.DEFAULT}"
    group.add_argument("--iou_threshold", type=flags.fraction, default=0.5, help=text)
    text = "also print the lowest score of each class that has this precision, such as 0.95"
    group.add_argument("--min_precision", type=flags.fraction, help=text)
    group.add_argument("--voc07", action="store_true", help="VOC's mAP by 11 points instead of the area")
    group.add_argument("--analyse", action="store_true", help="find out which kinds of errors cost how much AP (TIDE)")
    group.add_argument("--out", help="folder for detections.json, metrics.json and charts")
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_val"])
    if args.detections and (limits := sorted(flags.given_limits(args).keys() - {"max_detections"})):
        errors.append(f"--detections scores the file as it is, without --{' and --'.join(limits)}")
    if errors:
        parser.error("; ".join(errors))
    return args


def run_model(args: argparse.Namespace) -> tuple[DetectionDataset, dict[int, Detections], dict[str, Any]]:
    """The data set, and the model's detections in it and their limits; under torchrun, all processes share the work."""
    device = process.choose_device(args.device)
    process.init_distributed(device)
    net, info = load_model(args.model)
    dataset = flags.make_dataset(args, "val", Resizer(info["min_side"], info["max_side"]), info["class_names"])
    check_classes(args.model, info["class_names"], dataset)
    indices = None if args.limit is None else range(len(dataset))[: args.limit]
    loader = make_loader(dataset, args.batch_size, args.workers, indices=indices, device=device)
    net.to(device, memory_format=torch.channels_last)
    precision = process.choose_precision(args.precision, device)
    limits = inference.detection_limits(info, flags.given_limits(args))
    return dataset, inference.detect(net, loader, device, precision, **limits), limits


def read_file(args: argparse.Namespace) -> tuple[DetectionDataset, dict[int, Detections], list[dict[str, Any]]]:
    """The data set, and the detections of a results file in it, also as the file has them; no image is opened."""
    dataset = flags.make_dataset(args, "val", None)
    results, chosen = coco.read_results(dataset, args.detections), range(len(dataset))[: args.limit]
    found, ids = coco.to_detections(dataset, results), {dataset.image_ids[index] for index in chosen}
    results = [result for result in results if result["image_id"] in ids]
    return dataset, {index: found[index] for index in chosen}, results


@script
def main(argv: list[str] | None = None) -> None:
    """Score a detector as the flags say."""
    args = parse_arguments(argv)
    process.setup_logging()
    folder = flags.make_out_dir(args.out) if args.out else None
    if folder:
        report.check_folder(folder)
    if args.model:
        (dataset, found, limits), results = run_model(args), None
    else:
        (dataset, found, results), limits = read_file(args), LIMITS | flags.given_limits(args)
    if not process.is_main_process():
        return
    if args.model:
        log.info("detections with scores above %g:", limits["score_threshold"])
    write_skipped(folder, [dataset])
    count = limits["max_detections"], args.min_precision
    evaluation = report.evaluate(dataset, found, args.iou_threshold, args.voc07, args.analyse, results, *count)
    log.info("%s", evaluation.text())
    if not folder:
        return
    evaluation.write(folder)
    curves = {f"IoU {iou}": evaluation.coco.curves(row) for iou, row in (("0.50", 0), ("0.75", 5))}
    pictures = {"pr_curves.png": partial(charts.draw_curves, curves), "thresholds.png": evaluation.draw_thresholds}
    if lost := evaluation.errors:
        pictures["errors.png"] = partial(charts.draw_bars, lost.lost, "AP50 lost to each kind of error")
        title, names = f"detections with scores above {CONFUSION_SCORE}", [*dataset.classes, "background"]
        pictures["confusion.png"] = partial(charts.draw_matrix, lost.confusion, names, title)
    for name, draw in pictures.items():
        try:
            draw(folder / name)
        except (OSError, ValueError) as error:
            log.warning("warning: no %s: %s", name, error)
    log.info("\nwritten to %s: %s", folder, ", ".join(sorted(path.name for path in folder.iterdir())))


if __name__ == "__main__":
    sys.exit(main())
