"""Detection in one image, ResNet-50: ours beside its heads alone, the bare network, and torchvision's RetinaNet."""

import numpy as np
import torch
from networks import Floor, add_arguments, make_batch, make_networks
from side_by_side import make_parser, measure, report

from retinanet.data.images import read_image
from retinanet.data.transforms import Resizer, normalize
from retinanet.process import choose_precision
from retinanet.training.checkpoint import load_model


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=5)
    add_arguments(parser)
    parser.set_defaults(batch=1)
    parser.add_argument("--model", help="checkpoint to measure on --images, beside the bare network of its depth")
    parser.add_argument("--images", nargs="+", help="image files for --model, resized as in training (default: grey)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model:
        measure_trained(args)
        return
    torch.manual_seed(0)
    precision = choose_precision(args.precision, torch.device(args.device))
    ours, theirs, floor = (
        network.eval() for network in make_networks(args.classes, args.height, args.width, args.device)
    )
    # Make the outputs like those of a trained network: most logits far below the threshold, some hundreds above it.
    for head in (ours.classificationModel, theirs.head.classification_head):
        output = head.output if head is ours.classificationModel else head.cls_logits
        torch.nn.init.normal_(output.weight, std=0.01)
    images, _ = make_batch(args.batch, args.height, args.width, args.classes, 1, args.device)
    with torch.no_grad():
        for head, network in (
            (ours.classificationModel.output, ours),
            (theirs.head.classification_head.cls_logits, theirs),
        ):
            logits = network.heads(images)[0] if network is ours else head_logits(theirs, images)
            spread = (logits - logits.mean()).flatten()[::7].topk(max(1, logits.numel() // 7 // 10_000)).values[-1]
            head.weight.mul_(3 / spread)
            head.bias.fill_(-6)

    def run(program) -> None:
        with torch.no_grad(), torch.autocast(args.device, precision, enabled=precision != torch.float32):
            program()

    programs = {
        "ours": lambda: run(lambda: ours.detect(images)),
        "our heads alone": lambda: run(lambda: ours.heads(images)),
        "floor": lambda: run(lambda: floor(images)),
        "torchvision": lambda: run(lambda: theirs(list(images))),
    }
    seconds = measure(programs, args.repeats, args.device)
    bounds = {("ours", "our heads alone"): 0.88, ("ours", "floor"): 0.88, ("ours", "torchvision"): 0.85}
    with torch.no_grad():
        above = (ours.heads(images)[0].sigmoid() > 0.05).sum().item()
    title = f"detection, {args.batch} x {args.height} x {args.width}, {str(precision).removeprefix('torch.')}"
    report(title, seconds, bounds, args.json, **{"scores above 0.05": float(above)})


def measure_trained(args) -> None:
    """Measure a trained detector on images, beside the bare network."""
    device = torch.device(args.device)
    precision = choose_precision(args.precision, device)
    net, info = load_model(args.model)
    floor = Floor(net.num_classes, info["depth"]).eval()
    for network in (net, floor):
        network.to(device, memory_format=torch.channels_last)
    resizer = Resizer(info["min_side"], info["max_side"])
    arrays = [resizer({"img": read_image(path), "annot": np.zeros((0, 5))})["img"] for path in args.images or ()]
    arrays = arrays or [torch.full((args.height, args.width, 3), 200, dtype=torch.uint8)]
    batches = [normalize(array.permute(2, 0, 1)[None].to(device)) for array in arrays]

    def run(program) -> None:
        with torch.no_grad(), torch.autocast(args.device, precision, enabled=precision != torch.float32):
            for images in batches:
                program(images)

    programs = {"ours": lambda: run(net.detect), "floor": lambda: run(floor)}
    seconds = measure(programs, args.repeats, args.device)
    title = f"detection by {args.model}, images: {len(batches)}, the first of {tuple(batches[0].shape[2:])} pixels"
    report(title, seconds, {("ours", "floor"): 0.88}, args.json)


def head_logits(network, images: torch.Tensor) -> torch.Tensor:
    """The class logits of torchvision's network."""
    return network.head.classification_head(list(network.backbone(images).values()))


if __name__ == "__main__":
    main()
