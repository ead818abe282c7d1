"""Trains our network and torchvision's RetinaNet in turn, on the same images with the same budget, and compares AP.

Flags that are not listed below are those of train.py, for the data and the budget of both networks; they override
COMMON. Our network is trained by train.py itself. torchvision's network gets the batches of our loader (for a seed, the
same images, order and flips), its own losses and matching, AdamW with a one-cycle schedule, and our evaluator:

    python benchmarks/accuracy.py --csv_train train.csv --csv_val val.csv --csv_classes classes.csv --epochs 10

Results of finished trainings are kept in --out_dir, so that a long series can be interrupted and continued.
"""

import argparse
import json
import shlex
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from networks import torchvision_targets
from side_by_side import processor
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import train
from retinanet import detection, process
from retinanet.commands import flags
from retinanet.data.loader import make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Resizer
from retinanet.evaluation import coco as coco_eval
from retinanet.postprocess import Detections
from retinanet.training.accounting import Progress
from retinanet.training.checkpoint import LIMITS
from retinanet.training.engine import train_one_epoch
from retinanet.training.log import read_log
from retinanet.training.recipes import RECIPES, Schedule
from retinanet.training.settings import follow_recipe, training_transform

COMMON = "--dataset csv --depth 18 --weights none --recipe scratch --epochs 10 --batch_size 4 --min_side 320"
METRICS = ("AP", "AP50", "AP75")
# Of torchvision's network, for batches of 4; clipped to norm 1, as in `scratch`, it learns better than with norm 10.
LR, WEIGHT_DECAY, CLIP_NORM = 5e-4, 0.05, 1.0


class Torchvision(nn.Module):
    """torchvision's RetinaNet with our interface; BatchNorm is trained, torchvision's default for random weights."""

    def __init__(self, depth: int, num_classes: int):
        super().__init__()
        # As in `retinanet_resnet50_fpn`, but for any depth.
        backbone = _resnet_fpn_extractor(get_model(f"resnet{depth}"), 5, [2, 3, 4], LastLevelP6P7(256, 256))
        self.net = TorchvisionRetinaNet(backbone, num_classes, image_mean=[0.0] * 3, image_std=[1.0] * 3)
        # The images are already resized (torchvision's own `_skip_resize` works only in training).
        self.net.transform.resize = lambda image, target: (image, target)
        # Losses and boxes are computed in float32, as in our network.
        self.net.head.register_forward_hook(lambda head, inputs, out: {key: out[key].float() for key in out})

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] and annotations [B, G, 5] -> class loss and box loss, [1] each."""
        images, annotations = inputs
        targets = torchvision_targets([boxes[boxes[:, 4] >= 0] for boxes in annotations])
        losses = self.net(list(images), targets)
        return losses["classification"][None], losses["bbox_regression"][None]

    @torch.no_grad()
    def detect(self, images: Tensor, image_sizes: list[tuple[int, int]], **limits: float) -> list[Detections]:
        """As `RetinaNet.detect`; boxes are clipped to the images without their padding."""
        net = self.net
        net.score_thresh, net.nms_thresh = limits["score_threshold"], limits["nms_threshold"]
        net.topk_candidates, net.detections_per_img = limits["top_k"], limits["max_detections"]
        found = net([image[:, :height, :width] for image, (height, width) in zip(images, image_sizes, strict=True)])
        return [Detections(one["scores"], one["labels"], one["boxes"]) for one in found]


def train_torchvision(words: list[str], lr: float) -> dict[str, float]:
    """Train torchvision's network with the flags of train.py, and return COCO's numbers."""
    args = argparse.Namespace(**follow_recipe(vars(train.parse_arguments(words))))
    device = process.choose_device(args.device)
    precision = process.choose_precision(args.precision, device)
    process.seed_everything(args.seed)
    train_set = flags.make_dataset(args, "train", training_transform(args))
    val_set = flags.make_dataset(args, "val", Resizer(args.min_side, args.max_side))
    sampler = AspectRatioBasedSampler(train_set, args.batch_size, False, args.seed)
    loader = make_loader(train_set, args.batch_size, args.workers, sampler, device=device)
    val_loader = make_loader(val_set, args.batch_size, args.workers, device=device)
    net = Torchvision(args.depth, train_set.num_classes()).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr * args.batch_size / 4, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = Schedule(optimizer, RECIPES["scratch"], args.epochs * len(loader))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    with train_set.scaled(), val_set.scaled(train_set.pixel_range):
        clip_norm = args.clip_norm or CLIP_NORM
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            progress = Progress(epoch)
            done = train_one_epoch(net, loader, optimizer, scaler, schedule, device, precision, progress, clip_norm)
            process.log.info("epoch %d: loss %.3f, %.1f images/s", epoch, done["loss"], done["images_per_second"])
        limits = {name: getattr(args, name) for name in LIMITS}
        found = detection.detect(net, val_loader, device, precision, **limits)
    return coco_eval.score(val_set, found, args.max_detections).metrics


def train_ours(words: list[str], folder: Path) -> dict[str, float]:
    """Train our network with train.py, and return COCO's numbers of the last epoch."""
    if train.main([*words, "--out_dir", str(folder), "--val_every", "1000000"]):
        raise SystemExit("train.py failed")
    return read_log(folder / "log.jsonl")[-1]


def print_table(results: dict[str, list[dict[str, float]]], seeds: int) -> None:
    """Print each network's mean and standard deviation over the seeds, and the differences of the means."""
    print(f"{seeds} seeds, mean +- standard deviation ({processor()}, torch {torch.__version__})")
    print(" " * 12 + "".join(f"{name:>18}" for name in METRICS))
    means = {}
    for name, runs in results.items():
        columns = [[run[metric] for run in runs] for metric in METRICS]
        means[name] = [statistics.mean(column) for column in columns]
        spread = [statistics.stdev(column) if len(column) > 1 else 0.0 for column in columns]
        cells = zip(means[name], spread, strict=True)
        print(f"{name:12}" + "".join(f"   {mean:.4f} +- {deviation:.4f}" for mean, deviation in cells))
    if len(means) == 2:
        rows = zip(means["ours"], means["torchvision"], strict=True)
        print(f"{'difference':12}" + "".join(f"{ours - theirs:+18.4f}" for ours, theirs in rows))


def main() -> None:
    """Train both networks and compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each network, seeds 0, 1, ... (default: 3)")
    parser.add_argument("--only", choices=["ours", "torchvision"], help="train only one of the two")
    parser.add_argument("--ours", type=shlex.split, default=[], help='flags of our network only, as "--ema 0.999"')
    parser.add_argument("--lr", type=float, default=LR, help=f"of torchvision's, for batches of 4 (default: {LR:g})")
    parser.add_argument("--out_dir", type=Path, default=Path("runs/accuracy"), help="for trainings and results.json")
    own, others = parser.parse_known_args()
    process.setup_logging()
    own.out_dir.mkdir(parents=True, exist_ok=True)
    path = own.out_dir / "results.json"
    finished = json.loads(path.read_text()) if path.exists() else []
    results: dict[str, list[dict[str, float]]] = {}
    names = [own.only] if own.only else ["ours", "torchvision"]
    for seed in range(own.seeds):
        for name in names:
            words = [*COMMON.split(), *others, "--seed", str(seed), *(own.ours if name == "ours" else [])]
            theirs = {"lr": own.lr, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
            how = asdict(RECIPES["scratch"]) if name == "ours" else theirs
            key = {"network": name, "flags": " ".join(words), "how": how, "torch": torch.__version__}
            entry = next((one for one in finished if key.items() <= one.items()), None)
            if entry is None:
                start = time.monotonic()
                if name == "ours":
                    found = train_ours(words, own.out_dir / f"ours_{seed}")
                else:
                    found = train_torchvision(words, own.lr)
                metrics = {metric: found[metric] for metric in METRICS}
                entry = {**key, "processor": processor(), "minutes": (time.monotonic() - start) / 60, **metrics}
                finished.append(entry)
                path.write_text(json.dumps(finished, indent=1))
            results.setdefault(name, []).append(entry)
            process.log.info("%s, seed %d: %s", name, seed, "  ".join(f"{one} {entry[one]:.4f}" for one in METRICS))
    print_table(results, own.seeds)


if __name__ == "__main__":
    main()
