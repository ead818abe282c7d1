"""Batches of images of similar shape, drawn again for every epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from retinanet.data.dataset import DetectionDataset

# Images are sorted by shape within so many steps: few, so that the batches of every epoch differ.
SORTED_STEPS = 32


class AspectRatioBasedSampler(Sampler[list[int]]):
    """Batches of images of similar shape, so that little is padded; drawn again for every epoch.

    The images of an optimizer step are drawn first, then dealt to the processes and their batches. So two
    processes with batches of two see, step by step, what one process sees with batches of four.

    Args:
        data_source: a data set with `image_aspect_ratio`.
        batch_size: images a batch.
        drop_last: drop the last step if it is not full.
        seed: the order follows from it and the epoch alone.
        rank: which share of the batches is this process's.
        world_size: number of shares; all have the same length, so a few images of the last step may be repeated.
        accumulate: batches of one process in an optimizer step.
    """

    def __init__(
        self,
        data_source: DetectionDataset,
        batch_size: int,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
    ):
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.step_size = batch_size * world_size * accumulate
        self.epoch = 0
        self.first_step = 0
        self.aspect_ratios = np.array([data_source.image_aspect_ratio(index) for index in range(len(data_source))])

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the epoch that the next iteration draws, and its first step; the epoch then advances by itself."""
        self.epoch = epoch
        self.first_step = first_step

    def _num_batches(self, num_images: int) -> int:
        """Batches of each process that hold the images of a step."""
        return -(-num_images // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.aspect_ratios), self.step_size)
        batches = whole * self._num_batches(self.step_size)
        return batches if self.drop_last else batches + self._num_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        first_step, self.first_step = self.first_step, 0
        self.epoch += 1
        order = rng.permutation(len(self.aspect_ratios))
        num_whole = len(order) // self.step_size
        order, rest = np.split(order, [num_whole * self.step_size])
        stretches = np.split(order, range(SORTED_STEPS * self.step_size, len(order), SORTED_STEPS * self.step_size))
        order = np.concatenate([part[np.argsort(self.aspect_ratios[part], kind="stable")] for part in stretches])
        steps = [*order.reshape(num_whole, self.step_size)[rng.permutation(num_whole)]]
        if len(rest) and not self.drop_last:
            rest = rest[np.argsort(self.aspect_ratios[rest], kind="stable")]
            steps.append(rest)  # always the last, as it has fewer batches than the others
        for images in steps[first_step:]:
            parts = self._num_batches(len(images)) * self.world_size
            if len(images) < parts:  # every process needs a batch, or the others would wait for it forever
                images = np.resize(images, parts)
            for batch in np.array_split(images, parts)[self.rank :: self.world_size]:
                yield batch.tolist()
