"""Building blocks of the network, under the original's import path."""

from retinanet.boxes import BBoxTransform, ClipBoxes
from retinanet.resnet import BasicBlock, Bottleneck, conv3x3

__all__ = ["BBoxTransform", "BasicBlock", "Bottleneck", "ClipBoxes", "conv3x3"]
