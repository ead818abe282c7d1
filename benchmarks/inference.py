"""Detection in one image, ResNet-50: ours beside its heads alone, the bare network, and torchvision's RetinaNet."""

import argparse
import functools

import numpy as np
import torch
from networks import (
    Floor,
    add_precision_argument,
    add_size_arguments,
    imitate_training,
    make_batch,
    make_networks,
)
from side_by_side import make_parser, measure, parse, report

from retinanet.data.images import read_image
from retinanet.data.transforms import Resizer, normalize
from retinanet.model import RetinaNet
from retinanet.process import autocast, choose_precision
from retinanet.training.checkpoint import load_model


def load_trained(args: argparse.Namespace) -> tuple[RetinaNet, Floor, list[torch.Tensor]]:
    """A trained detector, the bare network of its depth, and normalised images, [1, 3, H, W] each."""
    net, info = load_model(args.model)
    floor = Floor(net.num_classes, info["depth"]).eval()
    for network in (net, floor):
        network.to(args.device, memory_format=torch.channels_last)
    resizer = Resizer(info["min_side"], info["max_side"])
    arrays = [resizer({"img": read_image(path), "annot": np.zeros((0, 5))})["img"] for path in args.images or ()]
    arrays = arrays or [torch.full((args.height, args.width, 3), 200, dtype=torch.uint8)]
    return net, floor, [normalize(array.permute(2, 0, 1)[None].to(args.device)) for array in arrays]


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=5)
    add_size_arguments(parser, batch=1)
    add_precision_argument(parser)
    parser.add_argument("--model", help="checkpoint to measure on --images, beside the bare network of its depth")
    parser.add_argument("--images", nargs="+", help="image files for --model, resized as in training (default: grey)")
    args = parse(parser)
    precision = choose_precision(args.precision, args.device)
    bounds, extra = {("ours", "floor"): 0.88}, {}
    if args.model:
        ours, floor, batches = load_trained(args)
        programs = {"ours": ours.detect, "floor": floor}
        title = f"detection by {args.model}, images: {len(batches)}, the first of {tuple(batches[0].shape[2:])} pixels"
    else:
        ours, theirs, floor = (network.eval() for network in make_networks(args))
        images, _ = make_batch(args)
        batches, their_head = [images], theirs.head.classification_head
        imitate_training(ours.classificationModel.output, lambda: ours.heads(images)[0])
        imitate_training(their_head.cls_logits, lambda: their_head(list(theirs.backbone(images).values())))
        programs = {
            "ours": ours.detect,
            "our heads alone": ours.heads,
            "floor": floor,
            "torchvision": lambda images: theirs(list(images)),
        }
        bounds |= {("ours", "our heads alone"): 0.88, ("ours", "torchvision"): 0.85}
        with torch.no_grad():
            extra["scores above 0.05"] = float((ours.heads(images)[0].sigmoid() > 0.05).sum())
        title = f"detection, {args.batch} x {args.height} x {args.width}, {str(precision).removeprefix('torch.')}"

    def run(program) -> None:
        with torch.no_grad(), autocast(args.device, precision):
            for images in batches:
                program(images)

    runs = {name: functools.partial(run, program) for name, program in programs.items()}
    report(title, measure(runs, args.repeats, args.device), bounds, args.json, **extra)


if __name__ == "__main__":
    main()
