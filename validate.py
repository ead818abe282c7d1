"""Score a detector: COCO's twelve numbers, each class's scores, and what costs AP."""

import argparse
import sys

from retinanet import api, process
from retinanet.commands import flags
from retinanet.evaluation import coco, report
from retinanet.process import script
from retinanet.results import check_csv
from retinanet.training.checkpoint import LIMITS, load_model
from retinanet.training.files import make_out_dir

SETTINGS = (  # flags that are arguments of `retinanet.validate`
    *("out", "save_csv", "iou_threshold", "voc07", "analyse", "min_precision", *LIMITS, "tile", "tile_overlap"),
    *("batch_size", "workers", "device", "precision", "limit"),
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags; a usage error lists all contradictions and exits with 2."""
    parser = flags.make_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="checkpoint, such as best.pt")
    source.add_argument("--detections", help="COCO results file of any detector, instead of a model")
    flags.add_data_arguments(parser, training=False)
    flags.add_detection_arguments(parser)
    flags.add_tile_arguments(parser, training=False)
    flags.add_machine_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--batch_size", type=flags.positive_int, default=4, help=f"images per batch {flags.DEFAULT}")
    group.add_argument("--limit", type=flags.positive_int, help="number of images, from the first one (default: all)")
    text = f"smallest IoU at which a box counts as found, for VOC's scores {flags.DEFAULT}"
    group.add_argument("--iou_threshold", type=flags.fraction, default=0.5, help=text)
    text = "also print each class's lowest score threshold that has this precision, such as 0.95"
    group.add_argument("--min_precision", type=flags.fraction, help=text)
    group.add_argument("--voc07", action="store_true", help="VOC's mAP from 11 points instead of the area")
    group.add_argument("--analyse", action="store_true", help="find out how much AP each kind of error costs (TIDE)")
    group.add_argument("--save_csv", metavar="FILE.csv", help=flags.SAVE_CSV)
    group.add_argument("--out", help="folder for report.html, detections.json, metrics.json and charts")
    args = parser.parse_args(argv)
    errors = flags.check_data_arguments(args, ["csv_val"])
    of_model = flags.given_limits(args) | flags.given_tiles(args)
    if args.detections and (given := sorted(of_model.keys() - {"max_detections"})):
        errors.append(f"--detections scores the file as it is, without --{' and --'.join(given)}")
    if errors:
        parser.error("; ".join(errors))
    return args


@script
def main(argv: list[str] | None = None) -> None:
    """Score a detector as the flags say."""
    args = parse_arguments(argv)
    process.setup_logging()
    if args.model:
        process.init_distributed(process.choose_device(args.device))
        net, info = load_model(args.model)
        dataset = flags.make_dataset(args, "val", None, info["class_names"])
        api.validate((net, info), dataset, **{name: getattr(args, name) for name in SETTINGS})
        return
    if args.out:
        report.check_folder(make_out_dir(args.out))
    if args.save_csv:
        check_csv(args.save_csv)
    dataset = flags.make_dataset(args, "val", None)
    ids = set(dataset.image_ids[: args.limit])
    results = [one for one in coco.read_results(dataset, args.detections) if one["image_id"] in ids]
    found = coco.to_detections(dataset, results)
    found = {index: found[index] for index in range(len(ids))}
    limit = args.max_detections or LIMITS["max_detections"]
    evaluation = report.Evaluation(
        dataset, found, args.iou_threshold, args.voc07, args.analyse, results, limit, args.min_precision
    )
    api.report_scores(evaluation, args.out, args.detections, save_csv=args.save_csv)


if __name__ == "__main__":
    sys.exit(main())
