"""RetinaNet: a backbone, a feature pyramid on top of it, and two small heads on every level of the pyramid.

"RetinaNet is a single, unified network composed of a backbone network and two task-specific subnetworks" (section 4).
The file follows the order of the paper's Figure 3: (b) the pyramid, (c) the class head, (d) the box head, then the
whole network. Part (a), the backbone, is in resnet.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet import losses, postprocess, sparse_head
from retinanet.anchors import PYRAMID_LEVELS, Anchors
from retinanet.boxes import BBoxTransform as BBoxTransform  # for the original's scripts, like ClipBoxes, model_urls
from retinanet.boxes import ClipBoxes as ClipBoxes
from retinanet.fused_loss import FusedFocalLoss
from retinanet.postprocess import Detections
from retinanet.resnet import ARCHITECTURES, Backbone, BasicBlock, Bottleneck, half_resolution, imagenet_weights
from retinanet.resnet import model_urls as model_urls

PRIOR = 0.01  # "every anchor should be labeled as foreground with confidence of ~pi" at the start (section 4.1)


class PyramidFeatures(nn.Module):
    """The feature pyramid network, P3 to P7 (Lin et al., "Feature Pyramid Networks", 2017).

    Coarse levels have the more meaningful features, fine levels the more precise positions. Each coarse level is
    upsampled and added to the finer one below it, which then has both.

    Args:
        C3_size: channels of the backbone's C3; likewise `C4_size` and `C5_size`.
        feature_size: channels of every level of the pyramid.
    """

    def __init__(self, C3_size: int, C4_size: int, C5_size: int, feature_size: int = 256):
        super().__init__()
        self.P5_1 = nn.Conv2d(C5_size, feature_size, kernel_size=1)
        self.P5_2 = nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1)
        self.P4_1 = nn.Conv2d(C4_size, feature_size, kernel_size=1)
        self.P4_2 = nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1)
        self.P3_1 = nn.Conv2d(C3_size, feature_size, kernel_size=1)
        self.P3_2 = nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1)
        # "P6 is obtained via a 3x3 stride-2 conv on C5"
        self.P6 = nn.Conv2d(C5_size, feature_size, kernel_size=3, stride=2, padding=1)
        # "P7 is computed by applying ReLU followed by a 3x3 stride-2 conv on P6"
        self.P7_2 = nn.Conv2d(feature_size, feature_size, kernel_size=3, stride=2, padding=1)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """C3, C4, C5 -> P3 to P7, each [B, feature_size, H / 2^level, W / 2^level], sizes rounded up."""
        c3, c4, c5 = inputs
        # Paper and original: nearest, x 2, so sizes must be divisible by 32. Here: nearest, to the neighbour's size,
        # because then any size works, and sizes divisible by 32 give the same result.
        p5 = self.P5_1(c5)
        p4 = self.P4_1(c4)
        p4 = p4 + F.interpolate(p5, size=p4.shape[-2:], mode="nearest")
        p3 = self.P3_1(c3)
        p3 = p3 + F.interpolate(p4, size=p3.shape[-2:], mode="nearest")
        p5 = self.P5_2(p5)
        p6 = half_resolution(self.P6, self.p6_input(c5, p5))
        p7 = half_resolution(self.P7_2, F.relu(p6))
        return [self.P3_2(p3), self.P4_2(p4), p5, p6, p7]

    def p6_input(self, c5: Tensor, p5: Tensor) -> Tensor:
        """What P6 is computed from: C5, as in the paper; some other libraries use P5."""
        return c5


class _Head(nn.Module):
    """Four 3x3 convolutions, and a fifth that gives `num_outputs` numbers per anchor (section 4, both subnets)."""

    def __init__(self, num_features_in: int, num_anchors: int, num_outputs: int, feature_size: int):
        super().__init__()
        self.num_outputs = num_outputs
        self.conv1 = nn.Conv2d(num_features_in, feature_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1)
        self.conv3 = nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1)
        self.conv4 = nn.Conv2d(feature_size, feature_size, kernel_size=3, padding=1)
        self.output = nn.Conv2d(feature_size, num_anchors * num_outputs, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, H * W * num_anchors, num_outputs], row by row as `Anchors` lists them."""
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x), inplace=True)
        return self.output(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.num_outputs)


class ClassificationModel(_Head):
    """The class head: one logit per class and anchor; `prior` is the probability of every class before training."""

    # Paper: "sigmoid activations are attached to output the KA binary predictions per spatial location". Original: the
    # same. Here: without them, because the loss and the ranking of detections are computed on logits.
    def __init__(
        self,
        num_features_in: int,
        num_anchors: int = 9,
        num_classes: int = 80,
        prior: float = PRIOR,
        feature_size: int = 256,
    ):
        super().__init__(num_features_in, num_anchors, num_classes, feature_size)
        self.prior = prior


class RegressionModel(_Head):
    """The box head: four deltas per anchor, shared by all classes."""

    def __init__(self, num_features_in: int, num_anchors: int = 9, feature_size: int = 256):
        super().__init__(num_features_in, num_anchors, 4, feature_size)


class RetinaNet(Backbone):
    """The whole detector. Its modules have the original's names, so that it can load the original's weights.

    In training mode, `net([images, annotations])` returns the two losses; in evaluation mode, `net(image)` returns the
    scores, labels and boxes of one image, and `detect` those of a batch.

    Args:
        num_classes: number of classes, without a background class.
        block: BasicBlock or Bottleneck.
        layers: number of blocks in each of the four stages of the backbone.
        anchors: the reference boxes; by default the paper's.
    """

    def __init__(
        self,
        num_classes: int,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        anchors: Anchors | None = None,
    ):
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        if anchors is not None and anchors.strides != [2**level for level in PYRAMID_LEVELS]:
            raise ValueError(f"strides of anchors must be {[2**i for i in PYRAMID_LEVELS]}, not {anchors.strides}")
        super().__init__(block, layers)
        self.num_classes = num_classes
        self.anchors = Anchors() if anchors is None else anchors
        self.focalLoss: losses.FocalLoss = FusedFocalLoss()  # may be replaced
        self.fpn = PyramidFeatures(*self.out_channels)
        self.regressionModel = RegressionModel(256, self.anchors.num_anchors)
        self.classificationModel = ClassificationModel(256, self.anchors.num_anchors, num_classes)
        self._initialise()

    def _initialise(self) -> None:
        # Paper: N(0, 0.01) in the heads. Original: He's initialisation by fan-out everywhere, and outputs that
        # start as constants. Here: the original's.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.regressionModel.output.weight)
        nn.init.zeros_(self.regressionModel.output.bias)
        nn.init.zeros_(self.classificationModel.output.weight)
        # "b = -log((1 - pi) / pi)": without it, the loss of the background dominates the first steps.
        pi = self.classificationModel.prior
        nn.init.constant_(self.classificationModel.output.bias, -math.log((1 - pi) / pi))

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """[B, 3, H, W] normalised -> P3 to P7, [B, 256, rows, columns] each."""
        return self.fpn(self.backbone(images.to(self.conv1.weight.dtype)))  # the weights need not be float32

    def heads(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The network's raw outputs at all anchors.

        Args:
            images: [B, 3, H, W] normalised; any height and width.

        Returns:
            Logits [B, A, K], deltas [B, A, 4] and anchors [1, A, 4] (xyxy, pixels of the input).
        """
        pyramid = self.pyramid(images)
        logits = torch.cat([self.classificationModel(level) for level in pyramid], dim=1)
        deltas = torch.cat([self.regressionModel(level) for level in pyramid], dim=1)
        return logits, deltas, self.anchors(images)

    def loss(self, images: Tensor, annotations: Tensor) -> tuple[Tensor, Tensor]:
        """Class loss [1] and box loss [1]; the box head runs only where an anchor is positive (sparse_head.py)."""
        anchors = self.anchors(images)
        labels, boxes = self.focalLoss.assign(anchors, annotations, self.num_classes)
        plan = sparse_head.Plan(labels >= 0, self.anchors.level_shapes(*images.shape[-2:]))
        pyramid = self.pyramid(images)
        logits = torch.cat([self.classificationModel(level) for level in pyramid], dim=1)
        deltas = sparse_head.run(self.regressionModel, pyramid, plan)
        losses = self.focalLoss.of_assigned(logits, deltas, anchors, labels, boxes)
        return tuple(loss.mean(dim=0, keepdim=True) for loss in losses)

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        score_threshold: float = postprocess.SCORE_THRESHOLD,
        nms_threshold: float = postprocess.NMS_THRESHOLD,
        top_k: int | None = postprocess.TOP_K,
        max_detections: int | None = postprocess.MAX_DETECTIONS,
        image_sizes: Sequence[tuple[float, float]] | None = None,
    ) -> list[Detections]:
        """Find objects in each image of a batch.

        Args:
            images: [B, 3, H, W] normalised.
            score_threshold: scores must be above it.
            nms_threshold: of two boxes of a class with an IoU above this, the one with the higher score is kept.
            top_k: candidates per pyramid level; None for all.
            max_detections: detections per image; None for all.
            image_sizes: height and width of each image without its padding, pixels; boxes are clipped to them. By
                default the size of the batch.

        Returns:
            The Detections of each image, best first; boxes in pixels of the input.
        """
        pyramid = self.pyramid(images)
        logits = torch.cat([self.classificationModel(level) for level in pyramid], dim=1)
        level_sizes = self.anchors.level_sizes(*images.shape[-2:])
        chosen = [postprocess.best_candidates(x, level_sizes, score_threshold, top_k) for x in logits]  # [N] each
        needed = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
        for row, candidates in zip(needed, chosen, strict=True):
            row[candidates // self.num_classes] = True
        plan = sparse_head.Plan(needed, self.anchors.level_shapes(*images.shape[-2:]))
        deltas = sparse_head.run(self.regressionModel, pyramid, plan)
        anchors = self.anchors(images)[0]
        if image_sizes is None:
            image_sizes = [tuple(images.shape[-2:])] * len(images)
        return [
            postprocess.select_detections(*parts, anchors, size, nms_threshold, max_detections)
            for *parts, size in zip(chosen, logits, deltas, image_sizes, strict=True)
        ]

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Losses in training mode, detections of one image in evaluation mode; the original's interface.

        Args:
            inputs: in training, images [B, 3, H, W] and annotations [B, G, 5] (x1, y1, x2, y2, label; rows of
                -1 are padding); in evaluation, one image [1, 3, H, W].

        Returns:
            In training, class loss [1] and box loss [1]; in evaluation, scores [N], labels [N] and boxes
            [N, 4] (xyxy, pixels of the input), best first.

        Raises:
            ValueError: the inputs do not fit the model's mode, or `check_annotations` finds an error.
        """
        if self.training:
            if isinstance(inputs, Tensor):
                raise ValueError("in training mode the model takes [images, annotations]; call eval() to detect")
            return self.loss(*inputs)
        if not isinstance(inputs, Tensor):
            raise ValueError("in evaluation mode the model takes images alone; call train() for the losses")
        if len(inputs) != 1:
            raise ValueError(f"the model takes one image at a time, not {len(inputs)}; use detect(images) for a batch")
        return tuple(self.detect(inputs)[0])


ResNet = RetinaNet  # the original has no class RetinaNet: its ResNet is the detector


def resnet(depth: int, num_classes: int, pretrained: bool | str = False, anchors: Anchors | None = None) -> RetinaNet:
    """A RetinaNet on a ResNet of the given depth.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of classes, without a background class.
        pretrained: start from torchvision's ImageNet weights, and freeze BatchNorm's statistics; True means
            IMAGENET1K_V1, as in the original, and a string names others, such as IMAGENET1K_V2.
        anchors: the reference boxes; by default the paper's.

    Raises:
        ValueError: there is no such depth, or there are no such weights.
        RuntimeError: as in `imagenet_weights`.
    """
    if depth not in ARCHITECTURES:
        raise ValueError(f"depth must be one of {', '.join(map(str, ARCHITECTURES))}, not {depth}")
    net = RetinaNet(num_classes, *ARCHITECTURES[depth], anchors)
    if pretrained:
        version = "IMAGENET1K_V1" if pretrained is True else pretrained
        net.load_state_dict(imagenet_weights(depth, version), strict=False)  # pyramid and heads are not in it
        net.freeze_bn()
    return net


def resnet18(num_classes: int, pretrained: bool | str = False, anchors: Anchors | None = None) -> RetinaNet:
    """RetinaNet on ResNet-18; the arguments are those of `resnet`."""
    return resnet(18, num_classes, pretrained, anchors)


def resnet34(num_classes: int, pretrained: bool | str = False, anchors: Anchors | None = None) -> RetinaNet:
    """RetinaNet on ResNet-34; the arguments are those of `resnet`."""
    return resnet(34, num_classes, pretrained, anchors)


def resnet50(num_classes: int, pretrained: bool | str = False, anchors: Anchors | None = None) -> RetinaNet:
    """RetinaNet on ResNet-50; the arguments are those of `resnet`."""
    return resnet(50, num_classes, pretrained, anchors)


def resnet101(num_classes: int, pretrained: bool | str = False, anchors: Anchors | None = None) -> RetinaNet:
    """RetinaNet on ResNet-101; the arguments are those of `resnet`."""
    return resnet(101, num_classes, pretrained, anchors)


def resnet152(num_classes: int, pretrained: bool | str = False, anchors: Anchors | None = None) -> RetinaNet:
    """RetinaNet on ResNet-152; the arguments are those of `resnet`."""
    return resnet(152, num_classes, pretrained, anchors)
