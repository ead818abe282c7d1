"""A training step, ResNet-50: ours beside torchvision's RetinaNet and Floor, without data loading and optimizer.

Floor is the bare network: BatchNorm is a separate operation, and the sum of all outputs is the loss.
"""

import copy
from collections.abc import Callable

import torch
from networks import add_precision_argument, add_size_arguments, make_batch, make_networks, torchvision_targets
from side_by_side import make_parser, measure, parse, peak_memory, report
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retinanet.process import autocast, choose_precision


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__, repeats=3)
    add_size_arguments(parser)
    add_precision_argument(parser)
    parser.add_argument("--plain", action="store_true", help="also time torchvision with its default flags")
    parser.add_argument("--frozen", action="store_true", help="also time ours with the frozen layers of recipe paper")
    parser.add_argument("--growth", action="store_true", help="also time ours on a quarter of the pixels")
    parser.add_argument("--compiled", action="store_true", help="also time ours under torch.compile")
    parser.add_argument("--peak", type=float, help="peak TFLOP/s of the device in this precision, from its data sheet")
    args = parse(parser)
    precision = choose_precision(args.precision, args.device)
    ours, theirs, floor = (network.train() for network in make_networks(args))
    images, annotations = make_batch(args)
    targets = torchvision_targets(annotations)

    def step(network: nn.Module, loss: Callable[[nn.Module], Tensor], dtype: torch.dtype = precision) -> None:
        with autocast(args.device, dtype):
            value = loss(network)
        value.backward()
        network.zero_grad()

    def our_loss(network: nn.Module) -> Tensor:
        return torch.cat(network([images, annotations])).sum()

    def dense_loss(network: nn.Module) -> Tensor:
        return torch.cat(network.focalLoss(*network.heads(images), annotations)).sum()

    def sum_of_outputs(network: nn.Module) -> Tensor:
        return sum(output.float().sum() for output in network(images))

    def torchvisions_loss(network: nn.Module) -> Tensor:
        return sum(network(list(images), targets).values())

    programs = {
        "ours": lambda: step(ours, our_loss),
        "ours, dense box head": lambda: step(ours, dense_loss),
        "floor": lambda: step(floor, sum_of_outputs),
        "torchvision": lambda: step(theirs, torchvisions_loss),
    }
    bounds = {("ours", "floor"): 0.88, ("ours", "ours, dense box head"): 1.02, ("ours", "torchvision"): 0.78}
    if args.plain:
        plain = copy.deepcopy(theirs).to(memory_format=torch.contiguous_format)
        contiguous = [image.contiguous() for image in images]
        programs["torchvision, default flags"] = lambda: step(
            plain, lambda network: sum(network(contiguous, targets).values()), torch.float32
        )
        bounds["ours", "torchvision, default flags"] = 0.25
    if args.frozen:
        frozen = copy.deepcopy(ours)
        frozen.freeze_bn(affine=True)
        frozen.freeze_stages(2)
        programs["ours, as recipe paper"] = lambda: step(frozen, our_loss)
        bounds["ours, as recipe paper", "ours"] = 0.90
    if args.growth:
        small = make_batch(args, shrink=2)
        programs["ours, a quarter of the pixels"] = lambda: step(
            ours, lambda network: torch.cat(network(list(small))).sum()
        )
        bounds["ours", "ours, a quarter of the pixels"] = 4.0
    if args.compiled:
        compiled = torch.compile(ours)
        programs["ours, compiled"] = lambda: step(compiled, our_loss)
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
