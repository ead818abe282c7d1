"""Samples -> batches. The data sets and transforms are here too, where the original's users import them from."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from retinanet.datasets import CocoDataset, CSVDataset, DetectionDataset
from retinanet.transforms import Augmenter, Normalizer, Resizer, UnNormalizer, pad_value

__all__ = [
    "AspectRatioBasedSampler",
    "Augmenter",
    "CSVDataset",
    "CocoDataset",
    "Normalizer",
    "Resizer",
    "UnNormalizer",
    "collater",
    "make_loader",
]

# Images of similar shape are looked for among this many batches, so that a batch meets new company every epoch.
SORTED_BATCHES = 32


def collater(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples to a batch; pictures and annotations are padded to the largest.

    Args:
        samples: dicts with `img` [H, W, 3] and `annot` [G, 5], usually from Resizer.

    Returns:
        `img` [B, 3, H, W] in the samples' dtype, channels_last; `annot` [B, G, 5] float32 with rows of -1 as
        padding (G is at least 1); and the samples' other entries as lists: `scale`, `size`, `index`.
    """
    images = [torch.as_tensor(sample["img"]) for sample in samples]
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    batch = images[0].new_empty(len(images), height, width, 3)
    batch[:] = pad_value(batch.dtype)
    for row, image in zip(batch, images, strict=True):
        row[: image.shape[0], : image.shape[1]] = image
    annotations = [torch.as_tensor(sample["annot"], dtype=torch.float32) for sample in samples]
    padded = torch.full((len(samples), max([1, *map(len, annotations)]), 5), -1.0)
    for row, boxes in zip(padded, annotations, strict=True):
        row[: len(boxes)] = boxes
    others = {key: [sample[key] for sample in samples] for key in samples[0] if key not in ("img", "annot")}
    return {"img": batch.permute(0, 3, 1, 2), "annot": padded, **others}


class AspectRatioBasedSampler(Sampler[list[int]]):
    """Batches of images of similar shape, so that little is padded; drawn anew every epoch.

    Args:
        data_source: a data set with `image_aspect_ratio`.
        batch_size: images a batch.
        drop_last: leave out a last batch that is not full.
        seed: the order follows from it and the epoch alone.
        rank: which share of the batches is this process's.
        world_size: number of shares; all have the same length, so some batches may stand twice.
    """

    def __init__(
        self,
        data_source: DetectionDataset,
        batch_size: int,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.aspect_ratios = np.array([data_source.image_aspect_ratio(index) for index in range(len(data_source))])

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration draws; it goes up by itself after each."""
        self.epoch = epoch

    def _num_batches(self) -> int:
        whole, rest = divmod(len(self.aspect_ratios), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __len__(self) -> int:
        return -(-self._num_batches() // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        order = rng.permutation(len(self.aspect_ratios))
        stretches = np.split(
            order, range(SORTED_BATCHES * self.batch_size, len(order), SORTED_BATCHES * self.batch_size)
        )
        order = np.concatenate([part[np.argsort(self.aspect_ratios[part], kind="stable")] for part in stretches])
        batches = [order[start : start + self.batch_size].tolist() for start in range(0, len(order), self.batch_size)]
        batches = batches[: self._num_batches()]
        batches = [batches[index] for index in rng.permutation(len(batches))]
        yield from itertools.islice(itertools.cycle(batches), self.rank, len(self) * self.world_size, self.world_size)


def make_loader(
    dataset: DetectionDataset,
    batch_size: int,
    workers: int = 0,
    batch_sampler: AspectRatioBasedSampler | None = None,
    indices: Sequence[int] | None = None,
) -> DataLoader:
    """A loader of batches: those of `batch_sampler` for training, else `indices` (default: all) in order.

    Args:
        dataset: gives samples.
        batch_size: images a batch, where there is no `batch_sampler`.
        workers: processes that read pictures; 0 reads them in this one.
        batch_sampler: yields lists of indices.
        indices: which samples, where there is no `batch_sampler`.
    """
    if batch_sampler is None:
        chosen = range(len(dataset)) if indices is None else indices
        batch_sampler = [list(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=collater,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
    )
