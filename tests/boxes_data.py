"""Data sets of boxes on images of one size that are in no file."""

import functools

import numpy as np

from retinanet.anchors import Anchors
from retinanet.data.dataset import DetectionDataset
from retinanet.visual import anchor_fit


def make_dataset(boxes, labels=None, size=(480, 640), num_images=1, names=("plate", "other")):
    """Boxes [N, 4], distributed over the images."""
    boxes = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes)) if labels is None else np.asarray(labels)
    annotations = np.concatenate([boxes, labels[:, None]], axis=1)
    files = [f"{index}.jpg" for index in range(num_images)]
    dataset = DetectionDataset(files, annotations, np.arange(len(boxes)) % num_images, names)
    dataset.known_sizes[:] = size
    return dataset


def random_boxes(count, size=(480, 640), widths=(8, 500), ratio=(0.2, 5.0)):
    width = np.exp(np.random.uniform(*np.log(widths), count))
    height = width / np.exp(np.random.uniform(*np.log(ratio), count))
    width, height = width.clip(2, size[1] - 2), height.clip(2, size[0] - 2)
    x, y = np.random.rand(count) * (size[1] - width), np.random.rand(count) * (size[0] - height)
    return np.stack([x, y, x + width, y + height], axis=1)


@functools.cache
def plates():
    """Small, wide number plates: the fit of the default anchors, the one that the search finds, and the data set."""
    np.random.seed(1)
    dataset = make_dataset(random_boxes(300, widths=(24, 60), ratio=(3, 4)), num_images=10)
    fit = anchor_fit.measure(dataset, Anchors(), 608, 1024)
    return fit, anchor_fit.search(fit), dataset
