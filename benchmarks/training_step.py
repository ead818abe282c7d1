"""A training step, ResNet-50: ours beside torchvision's RetinaNet and Floor, without data loading and optimizer.

Floor is the bare network: BatchNorm is a separate operation, and the sum of all outputs is the loss.
"""

import torch
from networks import add_arguments, make_batch, make_networks, torchvision_targets
from side_by_side import make_parser, measure, peak_memory, report
from torch.utils.flop_counter import FlopCounterMode

from retinanet.process import choose_precision


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=3)
    add_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="also time torchvision with its default flags")
    parser.add_argument("--frozen", action="store_true", help="also time ours with the frozen layers of recipe paper")
    parser.add_argument("--growth", action="store_true", help="also time ours on a quarter of the pixels")
    parser.add_argument("--compiled", action="store_true", help="also time ours under torch.compile")
    parser.add_argument("--peak", type=float, help="peak TFLOP/s of the device in this precision, from its data sheet")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    precision = choose_precision(args.precision, torch.device(args.device))
    ours, theirs, floor = (
        network.train() for network in make_networks(args.classes, args.height, args.width, args.device)
    )
    images, annotations = make_batch(args.batch, args.height, args.width, args.classes, args.boxes, args.device)
    targets = torchvision_targets(annotations)
    small = make_batch(args.batch, args.height // 2, args.width // 2, args.classes, args.boxes, args.device)

    def step(network: torch.nn.Module, loss, dtype: torch.dtype) -> None:
        with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        network.zero_grad()

    programs = {
        "ours": lambda: step(ours, lambda: torch.cat(ours([images, annotations])).sum(), precision),
        "ours, dense box head": lambda: step(
            ours, lambda: torch.cat(ours.focalLoss(*ours.heads(images), annotations)).sum(), precision
        ),
        "floor": lambda: step(floor, lambda: sum(output.float().sum() for output in floor(images)), precision),
        "torchvision": lambda: step(theirs, lambda: sum(theirs(list(images), targets).values()), precision),
    }
    bounds = {("ours", "floor"): 0.88, ("ours", "ours, dense box head"): 1.02, ("ours", "torchvision"): 0.78}
    if args.plain:
        plain = make_networks(args.classes, args.height, args.width, args.device)[1].to(
            memory_format=torch.contiguous_format
        )
        contiguous = [image.contiguous() for image in images]
        plain.train()
        programs["torchvision, default flags"] = lambda: step(
            plain, lambda: sum(plain(contiguous, targets).values()), torch.float32
        )
        bounds["ours", "torchvision, default flags"] = 0.25
    if args.frozen:
        frozen = make_networks(args.classes, args.height, args.width, args.device)[0].train()
        frozen.freeze_bn(affine=True)
        frozen.freeze_stages(2)
        programs["ours, as recipe paper"] = lambda: step(
            frozen, lambda: torch.cat(frozen([images, annotations])).sum(), precision
        )
        bounds["ours, as recipe paper", "ours"] = 0.90
    if args.growth:
        programs["ours, a quarter of the pixels"] = lambda: step(
            ours, lambda: torch.cat(ours(list(small))).sum(), precision
        )
        bounds["ours", "ours, a quarter of the pixels"] = 4.0
    if args.compiled:
        compiled = torch.compile(ours)
        programs["ours, compiled"] = lambda: step(
            ours, lambda: torch.cat(compiled([images, annotations])).sum(), precision
        )
        bounds["ours, compiled", "ours"] = 1.0
    seconds = measure(programs, args.repeats, args.device)
    with FlopCounterMode(display=False) as counter:
        programs["floor"]()
    extra = {}
    for name in ("ours", "floor", "torchvision"):
        speed = counter.get_total_flops() / seconds[name] / 1e12
        extra[f"{name}: images/s"] = args.batch / seconds[name]
        extra[f"{name}: TFLOP/s"] = speed
        if args.peak:
            extra[f"{name}: share of the device's peak"] = speed / args.peak
        extra[f"{name}: peak memory beyond weights and images, GiB"] = peak_memory(programs[name], args.device) / 2**30
    title = f"training step, {args.batch} x {args.height} x {args.width}, {str(precision).removeprefix('torch.')}"
    report(title, seconds, bounds, args.json, **extra)


if __name__ == "__main__":
    main()
