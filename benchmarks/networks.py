"""The networks that the benchmarks compare: ours, torchvision's RetinaNet, and the bare network, Floor."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import retinanet_resnet50_fpn
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet

from retinanet.model import RetinaNet, resnet50
from retinanet.process import PRECISIONS


class Floor(nn.Module):
    """The bare network in plain PyTorch: torchvision's ResNet with BatchNorm in eval mode, and plain convolutions."""

    def __init__(self, classes: int, depth: int = 50):
        super().__init__()
        self.backbone = get_model(f"resnet{depth}")
        c5 = self.backbone.fc.in_features
        self.backbone.fc = nn.Identity()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 256, 1) for channels in (c5 // 4, c5 // 2, c5))
        self.smooth = nn.ModuleList(nn.Conv2d(256, 256, 3, padding=1) for _ in range(3))
        self.p6, self.p7 = nn.Conv2d(c5, 256, 3, 2, 1), nn.Conv2d(256, 256, 3, 2, 1)
        self.heads = nn.ModuleList(
            nn.Sequential(
                *(layer for _ in range(4) for layer in (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True))),
                nn.Conv2d(256, 9 * outputs, 3, padding=1),
            )
            for outputs in (classes, 4)
        )

    def train(self, mode: bool = True) -> "Floor":
        """As in nn.Module, but BatchNorm stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the outputs of both heads, level by level."""
        backbone = self.backbone
        x = backbone.layer1(backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(images)))))
        c3 = backbone.layer2(x)
        c4 = backbone.layer3(c3)
        c5 = backbone.layer4(c4)
        p5 = self.lateral[2](c5)
        p4 = self.lateral[1](c4) + nn.functional.interpolate(p5, size=c4.shape[-2:])
        p3 = self.lateral[0](c3) + nn.functional.interpolate(p4, size=c3.shape[-2:])
        p6 = self.p6(c5)
        levels = [conv(p) for conv, p in zip(self.smooth, (p3, p4, p5), strict=True)]
        levels += [p6, self.p7(nn.functional.relu(p6))]
        return [head(level) for head in self.heads for level in levels]


def make_networks(args: argparse.Namespace) -> tuple[RetinaNet, TorchvisionRetinaNet, Floor]:
    """The three networks with random weights, frozen BatchNorm and channels_last; all layers train.

    `args` has the flags of `add_size_arguments`.
    """
    ours = resnet50(args.classes)
    ours.freeze_bn()
    sides = sorted([args.height, args.width])
    theirs = retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=args.classes, min_size=sides[0], max_size=sides[1]
    )
    networks = ours, theirs, Floor(args.classes)
    return tuple(network.to(args.device, memory_format=torch.channels_last) for network in networks)


@torch.no_grad()
def imitate_training(output: nn.Conv2d, logits: Callable[[], Tensor]) -> None:
    """Set a class head's last layer such that most `logits` are near -6, and one in 10,000 is above -3."""
    nn.init.normal_(output.weight, std=0.01)
    values = logits().flatten()
    spread = values.topk(max(1, len(values) // 10_000)).values[-1] - values.mean()
    output.weight.mul_(3 / spread)
    output.bias.fill_(-6)


def make_batch(args: argparse.Namespace, shrink: int = 1) -> tuple[Tensor, Tensor]:
    """Random normalised images, channels_last, and boxes as large as COCO's: sides of 24 to 330 pixels at 608 x 800.

    `args` has the flags of `add_size_arguments`; height and width are divided by `shrink`.
    """
    height, width, device = args.height // shrink, args.width // shrink, args.device
    images = torch.randn(args.batch, 3, height, width, device=device).contiguous(memory_format=torch.channels_last)
    size = torch.tensor([width, height], device=device)
    side = 24 * (330 / 24) ** torch.rand(args.batch, args.boxes, 2, device=device) * min(height, width) / 608
    corner = torch.rand(args.batch, args.boxes, 2, device=device) * (size - side).clamp(min=0)
    labels = torch.randint(0, args.classes, (args.batch, args.boxes, 1), device=device)
    return images, torch.cat([corner, corner + side, labels], dim=-1)


def torchvision_targets(annotations: Tensor) -> list[dict[str, Tensor]]:
    """Convert annotations of each image, [G, 5], to torchvision's targets."""
    return [{"boxes": boxes[:, :4], "labels": boxes[:, 4].long()} for boxes in annotations]


def add_size_arguments(parser: argparse.ArgumentParser, batch: int = 2, boxes: int = 7) -> None:
    """Add flags for the size of the problem, with these defaults."""
    parser.add_argument("--batch", type=int, default=batch, help="images")
    parser.add_argument("--height", type=int, default=608, help="pixels")
    parser.add_argument("--width", type=int, default=800, help="pixels")
    parser.add_argument("--classes", type=int, default=80, help="classes")
    parser.add_argument("--boxes", type=int, default=boxes, help="boxes per image")


def add_precision_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the precision."""
    parser.add_argument("--precision", choices=["auto", *PRECISIONS], default="auto", help="of the networks")
