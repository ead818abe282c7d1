"""The backbone: a residual network without its classifier (He et al., "Deep Residual Learning", 2015).

"P3 to P5 are computed from the output of the corresponding ResNet residual stage (C3 through C5)" (RetinaNet, section
4). This is ResNet v1.5, where a bottleneck block halves the resolution in its 3x3 convolution: torchvision's ImageNet
weights, the usual starting point, are of this form.
"""

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model_weights


def conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """A convolution and its batch normalisation.

    While BatchNorm's statistics are frozen, it only scales and shifts each channel, and can be folded into the
    convolution: weight * gamma / sigma. This is the same function with the same gradients, and it saves a pass over
    the activations in each direction.

    Args:
        conv: without a bias.
        bn: over `conv`'s output channels.
        x: [B, C, H, W].
    """
    if bn.training:
        return bn(conv(x))
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, bn.bias - bn.running_mean * scale, conv.stride, conv.padding)


def half_resolution(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Run a convolution of stride 2, in float32 if the feature map has only one column.

    For such a map, torch 2.14 leaves parts of the weight's bfloat16 gradient uninitialised on a CPU.
    """
    if x.shape[-1] > 1:
        return conv(x)
    with torch.autocast(x.device.type, enabled=False):
        parameters = conv.weight.float(), conv.bias.float()
        return F.conv2d(x.float(), *parameters, conv.stride, conv.padding).to(x.dtype)


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution, padded so that only the stride changes the size."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18 and 34."""

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, inplanes, H, W] -> [B, planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_bn(*self.downsample, x)
        x = self.relu(conv_bn(self.conv1, self.bn1, x))
        x = conv_bn(self.conv2, self.bn2, x)
        return self.relu(x.add_(shortcut))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a shortcut: ResNet-50, 101 and 152."""

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None):
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """[B, inplanes, H, W] -> [B, 4 * planes, H / stride, W / stride]."""
        shortcut = x if self.downsample is None else conv_bn(*self.downsample, x)
        x = self.relu(conv_bn(self.conv1, self.bn1, x))
        x = self.relu(conv_bn(self.conv2, self.bn2, x))
        x = conv_bn(self.conv3, self.bn3, x)
        return self.relu(x.add_(shortcut))


class Backbone(nn.Module):
    """ResNet up to its last residual stage.

    Args:
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages.
    """

    def __init__(self, block: type[BasicBlock] | type[Bottleneck], layers: Sequence[int]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_stage(block, 64, 64, layers[0], stride=1)
        self.layer2 = self._make_stage(block, 64 * block.expansion, 128, layers[1], stride=2)
        self.layer3 = self._make_stage(block, 128 * block.expansion, 256, layers[2], stride=2)
        self.layer4 = self._make_stage(block, 256 * block.expansion, 512, layers[3], stride=2)
        self.out_channels = [planes * block.expansion for planes in (128, 256, 512)]
        self.bn_frozen = False

    @staticmethod
    def _make_stage(
        block: type[BasicBlock] | type[Bottleneck], inplanes: int, planes: int, num_blocks: int, stride: int
    ) -> nn.Sequential:
        out_planes = planes * block.expansion
        downsample = None
        if stride != 1 or inplanes != out_planes:
            downsample = nn.Sequential(conv1x1(inplanes, out_planes, stride), nn.BatchNorm2d(out_planes))
        blocks = [block(inplanes, planes, stride, downsample)]
        blocks += [block(out_planes, planes) for _ in range(num_blocks - 1)]
        return nn.Sequential(*blocks)

    def freeze_bn(self, frozen: bool = True, affine: bool = False) -> None:
        """Freeze BatchNorm's statistics; they stay frozen through every later `train()`.

        A detector's batches are too small for reliable statistics.

        Args:
            frozen: False lets training update them again.
            affine: also stop training the scale and the shift.
        """
        # Paper: silent (Detectron: scale and shift frozen, too). Original: statistics frozen until the next train().
        # Here: until unfrozen, because forgetting to repeat the call costs accuracy without any warning.
        self.bn_frozen = frozen
        for module in self.modules():
            if affine and isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Switch between training and evaluation; BatchNorm stays in evaluation while it is frozen."""
        super().train(mode)
        if self.bn_frozen:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                    module.eval()
        return self

    def freeze_stages(self, number: int) -> None:
        """Stop training conv1 and the first `number` - 1 residual stages; `number` is 0 (none) to 4.

        Their weights get no gradients, and their activations are not stored.

        Raises:
            ValueError: `number` is out of range.
        """
        # Paper: silent (Detectron: 2, conv1 and the first stage). Original: 0. Here: 0, but 2 in recipe `paper`.
        if not 0 <= number <= 4:
            raise ValueError(f"0 to 4 stages can be frozen, not {number}")
        for stage in [nn.ModuleList([self.conv1, self.bn1]), self.layer1, self.layer2, self.layer3][:number]:
            stage.requires_grad_(False)

    def backbone(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, H, W] -> C3, C4, C5: the outputs of the last three stages, at strides 8, 16 and 32."""
        x = self.maxpool(self.relu(conv_bn(self.conv1, self.bn1, images)))
        c3 = self.layer2(self.layer1(x))
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)


# Depth -> the block, and the number of blocks in each stage (He et al., table 1).
ARCHITECTURES = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

# The original's ImageNet weights.
model_urls = {f"resnet{depth}": get_model_weights(f"resnet{depth}")["IMAGENET1K_V1"].url for depth in ARCHITECTURES}


def imagenet_weights(depth: int, version: str = "IMAGENET1K_V1") -> dict[str, Tensor]:
    """The backbone's weights from torchvision, trained on ImageNet.

    They are downloaded once and kept in torch.hub's folder; a file placed there by hand is used, too.

    Args:
        depth: 18, 34, 50, 101 or 152.
        version: torchvision's name of the weights; the original uses the default. IMAGENET1K_V2, for depth 50 and
            more, are better classifiers.

    Raises:
        ValueError: torchvision has no such weights.
        RuntimeError: the file is damaged, or is missing and cannot be downloaded; the message says what to do.
    """
    known = get_model_weights(f"resnet{depth}")
    if version not in known.__members__:
        names = ", ".join(weights.name for weights in known)
        raise ValueError(f"torchvision has no weights {version} for ResNet-{depth}; available: {names}")
    weights = known[version]
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if file.is_file():
            raise RuntimeError(f"{file}: is damaged; remove it, or replace it with {weights.url}") from error
        raise RuntimeError(
            f"cannot download the ImageNet weights of ResNet-{depth} ({error}). Put {weights.url} into {file.parent}, "
            "or start from random weights: `train.py --weights none --recipe scratch`, or pretrained=False in Python"
        ) from error
    return {key: value for key, value in state.items() if not key.startswith("fc.")}
