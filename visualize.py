"""Look at a trained RetinaNet: its detections beside the ground truth, as one PNG file."""

import argparse
import sys

import numpy as np
import torch

from retinanet import engine
from retinanet.checkpoint import load_model
from retinanet.cli import (
    add_data_arguments,
    add_detection_arguments,
    add_machine_arguments,
    check_classes,
    check_data_arguments,
    make_out_dir,
    make_parser,
    positive_int,
    validation_dataset,
)
from retinanet.dataloader import Resizer, make_loader
from retinanet.datasets import DetectionDataset
from retinanet.drawing import contact_sheet, draw_boxes, save_picture, side_by_side
from retinanet.postprocess import Detections
from retinanet.utils import choose_device, choose_precision, log, script, setup_logging


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Flags -> values; a usage error exits with 2."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="checkpoint, such as best.pt")
    add_data_arguments(parser, training=False)
    add_detection_arguments(parser, score_threshold=0.5)
    add_machine_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--limit", type=positive_int, default=12, help="pictures on the sheet")
    group.add_argument("--columns", type=positive_int, default=3, help="of the sheet")
    group.add_argument("--out_dir", default="runs/pictures", help="folder for detections.png")
    args = parser.parse_args(argv)
    errors = check_data_arguments(args, ["csv_val"])
    if errors:
        parser.error("; ".join(errors))
    return args


def draw_pair(dataset: DetectionDataset, index: int, detections: Detections) -> np.ndarray:
    """The ground truth and the detections of one image, side by side."""
    image, truth = dataset.load_image(index), dataset.load_annotations(index)
    truth_labels = truth[:, 4].astype(int)
    scores, labels, boxes = (tensor.numpy() for tensor in detections)
    captions = [f"{dataset.label_to_name(label)} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    pictures = [
        draw_boxes(image, truth[:, :4], truth_labels, [dataset.label_to_name(label) for label in truth_labels]),
        draw_boxes(image, boxes, labels, captions),
    ]
    return side_by_side(pictures, ["ground truth", "detections"])


@script
def main(argv: list[str] | None = None) -> None:
    """Draw as the flags say."""
    args = parse_arguments(argv)
    setup_logging()
    device = choose_device(args.device)
    net, info = load_model(args.model)
    dataset = validation_dataset(args, Resizer(info["min_side"], info["max_side"]))
    check_classes(args.model, info["class_names"], dataset)
    indices = range(min(args.limit, len(dataset)))
    loader = make_loader(dataset, args.batch_size, args.workers, indices=indices)
    net.to(device, memory_format=torch.channels_last)
    found = engine.detect(
        net,
        loader,
        device,
        choose_precision(args.precision, device),
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
    )
    path = make_out_dir(args.out_dir) / "detections.png"
    save_picture(contact_sheet([draw_pair(dataset, index, found[index]) for index in indices], args.columns), path)
    log.info("%d pictures: %s", len(indices), path)


if __name__ == "__main__":
    sys.exit(main())
