"""Score a trained RetinaNet with COCO's twelve numbers."""

import argparse
import sys

import torch

from retinanet import coco_eval, engine
from retinanet.checkpoint import load_model
from retinanet.cli import (
    add_data_arguments,
    add_detection_arguments,
    add_machine_arguments,
    check_classes,
    check_data_arguments,
    make_parser,
    validation_dataset,
)
from retinanet.dataloader import Resizer, make_loader
from retinanet.utils import choose_device, choose_precision, log, script, setup_logging


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error exits with 2."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint, such as best.pt")
    add_data_arguments(parser, training=False)
    add_detection_arguments(parser, score_threshold=0.05)
    add_machine_arguments(parser)
    args = parser.parse_args(argv)
    errors = check_data_arguments(args, ["csv_val"])
    if errors:
        parser.error("; ".join(errors))
    return args


@script
def main(argv: list[str] | None = None) -> None:
    """Validate as the flags say."""
    args = parse_arguments(argv)
    setup_logging()
    device = choose_device(args.device)
    net, info = load_model(args.model)
    dataset = validation_dataset(args, Resizer(info["min_side"], info["max_side"]))
    check_classes(args.model, info["class_names"], dataset)
    loader = make_loader(dataset, args.batch_size, args.workers)
    net.to(device, memory_format=torch.channels_last)
    found = engine.detect(
        net,
        loader,
        device,
        choose_precision(args.precision, device),
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
    )
    results = coco_eval.coco_results(dataset, found)
    metrics = coco_eval.score(coco_eval.ground_truth(dataset), results, dataset.image_ids)
    log.info("%d images, %d detections\n%s", len(dataset), len(results), coco_eval.metrics_table(metrics))


if __name__ == "__main__":
    sys.exit(main())
