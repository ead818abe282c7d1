"""Batches of images of similar shape, drawn again for every epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from retinanet.data.dataset import DetectionDataset

# Images are sorted by shape within so many steps: few, so that the batches of every epoch differ.
SORTED_STEPS = 32


def repeat_factors(dataset: DetectionDataset, threshold: float | None, tile: int | None = None) -> np.ndarray:
    """How often an epoch should show each image [I], at least 1, so that rare classes are seen more often.

    A class that a share f of the images holds asks for sqrt(threshold / f), an image for what its rarest class does
    (repeat-factor sampling: Gupta et al., "LVIS", 2019, appendix B.2).
    With a `tile`, the side of those that are drawn from images, each image is shown as often as tiles cover it.
    """
    factors = np.ones(len(dataset))
    if threshold is not None:
        pairs = np.unique(np.stack([dataset.image_index, dataset.annotations[:, 4].astype(np.int64)]), axis=1)
        shares = np.bincount(pairs[1]) / len(dataset)
        np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
    return factors if tile is None else factors * (-(-np.asarray(dataset.image_sizes) // tile)).prod(axis=1)


def epoch_size(factors: np.ndarray) -> int:
    """The number of images of an epoch, the same for all: the sum of the factors, rounded up."""
    return int(np.ceil(factors.sum() - 1e-6))  # a whole sum may be a little more than that in floating point


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
        balance, tile: of `repeat_factors`. Every epoch shows each image once, and as many repeats as make up
            `epoch_size`: chance decides, anew for each epoch, whether a factor is rounded up or down.
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
        balance: float | None = None,
        tile: int | None = None,
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
        self.num_images = len(self.aspect_ratios)
        self.factors = repeat_factors(data_source, balance, tile)
        self.epoch_size = epoch_size(self.factors)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Set the epoch that the next iteration draws, and its first step; the epoch then advances by itself."""
        self.epoch = epoch
        self.first_step = first_step

    def _num_batches(self, num_images: int) -> int:  # of each process, that hold the images of a step
        return -(-num_images // (self.batch_size * self.world_size))

    def __len__(self) -> int:
        whole, rest = divmod(self.epoch_size, self.step_size)
        batches = whole * self._num_batches(self.step_size)
        return batches if self.drop_last else batches + self._num_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.numbered_batches():
            yield [number % self.num_images for number in batch]

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """The images of an epoch, in random order, numbered as in `numbered_batches`."""
        images = np.arange(self.num_images)
        if extra := self.epoch_size - self.num_images:
            # The images lie on a line, each as long as its repeats. Points at equal distances, of 1 or a little less,
            # hit each as often as that, rounded up or down.
            line = (self.factors - 1).cumsum()
            hit = np.searchsorted(line[:-1], (np.arange(extra) + rng.random()) * line[-1] / extra, side="right")
            repeat = np.arange(extra) - np.searchsorted(hit, hit) + 1  # 1, 2, ... of each image
            images = np.concatenate([images, hit + repeat * self.num_images])
        return rng.permutation(images)

    def _sorted(self, numbers: np.ndarray) -> np.ndarray:
        return numbers[np.argsort(self.aspect_ratios[numbers % self.num_images], kind="stable")]

    def numbered_batches(self) -> Iterator[list[int]]:
        """As iteration, but the k-th repeat of image i is i + k * `num_images`: each is augmented in its own way."""
        rng = np.random.default_rng([self.seed, self.epoch])
        first_step, self.first_step = self.first_step, 0
        self.epoch += 1
        order = self._draw(rng)
        num_whole = len(order) // self.step_size
        order, rest = np.split(order, [num_whole * self.step_size])
        stretches = np.split(order, range(SORTED_STEPS * self.step_size, len(order), SORTED_STEPS * self.step_size))
        order = np.concatenate([self._sorted(part) for part in stretches])
        steps = [*order.reshape(num_whole, self.step_size)[rng.permutation(num_whole)]]
        if len(rest) and not self.drop_last:
            steps.append(self._sorted(rest))  # always the last, as it has fewer batches than the others
        for images in steps[first_step:]:
            parts = self._num_batches(len(images)) * self.world_size
            if len(images) < parts:  # every process needs a batch, or the others would wait for it forever
                images = np.resize(images, parts)
            for batch in np.array_split(images, parts)[self.rank :: self.world_size]:
                yield batch.tolist()
