"""Where the original's users import building blocks from."""

from retinanet.boxes import BBoxTransform, ClipBoxes
from retinanet.resnet import BasicBlock, Bottleneck, conv3x3

__all__ = ["BBoxTransform", "BasicBlock", "Bottleneck", "ClipBoxes", "conv3x3"]
