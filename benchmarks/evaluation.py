"""Evaluation of a data set, beside the bare network on the same batches plus the time of pycocotools."""

from collections.abc import Callable

import torch
from networks import imitate_training
from side_by_side import make_parser, measure, parse, report, timed

from retinanet.data.loader import make_loader
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Resizer, normalize
from retinanet.detection import detect
from retinanet.evaluation import coco as coco_eval
from retinanet.model import resnet50


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=2)
    parser.add_argument("--images", type=int, default=16, help="number of images")
    parser.add_argument("--side", type=int, default=320, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, default=4, help="images per batch")
    args = parse(parser)
    net = resnet50(80).eval().to(args.device, memory_format=torch.channels_last)
    dataset = ShapesDataset(args.images, size=args.side, transform=Resizer(args.side, args.side))
    dataset.labels = {label: f"class {label}" for label in range(80)}
    dataset.coco_labels = {label: label for label in range(80)}
    loader = make_loader(dataset, args.batch)
    batches = [normalize(batch["img"].to(args.device)) for batch in loader]
    output = net.classificationModel.output
    imitate_training(output, lambda: torch.cat([net.heads(images)[0] for images in batches]))
    found = detect(net, loader, args.device)

    @torch.no_grad()
    def run(program: Callable[[torch.Tensor], object]) -> None:
        for images in batches:
            program(images)

    programs = {
        "ours, all": lambda: coco_eval.score(dataset, detect(net, loader, args.device)),
        "bare network": lambda: run(net.heads),
        "network and detection": lambda: run(net.detect),
        "pycocotools": lambda: coco_eval.score(dataset, found),
    }
    seconds = measure(programs, args.repeats, args.device)
    seconds["bare network + pycocotools"] = seconds["bare network"] + seconds["pycocotools"]
    bounds = {("ours, all", "bare network + pycocotools"): 1.15, ("network and detection", "bare network"): 1.05}
    with torch.no_grad():
        output.bias.fill_(6)
        worst = timed(lambda: net.detect(batches[0][:1]), args.device)
    count = sum(len(one.scores) for one in found.values())
    extra = {"detections an image": count / args.images, "worst case, one image, s": worst}
    report(f"evaluating {args.images} x {args.side} x {args.side}", seconds, bounds, args.json, **extra)


if __name__ == "__main__":
    main()
