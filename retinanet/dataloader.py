"""Data sets and transforms, under the original's import path."""

from retinanet.data.coco import CocoDataset
from retinanet.data.csv import CSVDataset
from retinanet.data.loader import collater
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Augmenter, Normalizer, Resizer, UnNormalizer

__all__ = [
    "AspectRatioBasedSampler",
    "Augmenter",
    "CSVDataset",
    "CocoDataset",
    "Normalizer",
    "Resizer",
    "UnNormalizer",
    "collater",
]
