"""Batches of images with similar shapes, drawn anew for every epoch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from retinanet.data.dataset import DetectionDataset

# Images are sorted by shape within this many steps: few enough that the batches of every epoch differ.
SORTED_STEPS = 32


def repeat_factors(dataset: DetectionDataset, threshold: float | None, tile: int | None = None) -> np.ndarray:
    """How often an epoch should show each image [I], at least 1, so that rare classes are seen more often.

    A class that occurs in a share f of the images has the factor sqrt(threshold / f), and an image that of its rarest
    class (repeat-factor sampling: Gupta et al., "LVIS", 2019, appendix B.2). If tiles of side `tile` are drawn from the
    images, the factor is multiplied by the number of tiles that cover the image.
    """
    factors = np.ones(len(dataset))
    if threshold is not None:
        pairs = np.unique(np.stack([dataset.image_index, dataset.annotations[:, 4].astype(np.int64)]), axis=1)
        shares = np.bincount(pairs[1]) / len(dataset)
        np.maximum.at(factors, pairs[0], np.sqrt(threshold / shares[pairs[1]]))
    return factors if tile is None else factors * (-(-np.asarray(dataset.image_sizes) // tile)).prod(axis=1)


def epoch_size(factors: np.ndarray) -> int:
    """The number of images in every epoch: the sum of the factors, rounded up."""
    return int(np.ceil(factors.sum() - 1e-6))  # in floating point, a whole sum may come out slightly too large


class AspectRatioBasedSampler(Sampler[list[int]]):
    """Batches of images with similar shapes, so that they need little padding; drawn anew for every epoch.

    The images of an optimizer step are drawn first, then divided among the processes and their batches. So two
    processes with batches of two see, step by step, what one process sees with batches of four.

    Args:
        data_source: a data set with `image_aspect_ratio`.
        batch_size: images per batch.
        drop_last: drop the last step if it is not full.
        seed: the order depends on it and the epoch alone.
        rank: which share of the batches this process gets.
        world_size: number of shares; all have the same length, so a few images of the last step may be repeated.
        accumulate: batches per process in an optimizer step.
        balance, tile: see `repeat_factors`. Every epoch shows each image once, and enough repeats to make up
            `epoch_size`; whether a factor is rounded up or down is drawn anew for each epoch.
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
        """Set the epoch and the first step of the next iteration; the epoch then advances by itself."""
        self.epoch = epoch
        self.first_step = first_step

    def _num_batches(self, num_images: int) -> int:  # that each process needs for so many images of a step
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
            # Each image is a section of a line, with its number of repeats as length. Points at equal distances, of 1
            # or slightly less, hit each section that many times, rounded up or down.
            line = (self.factors - 1).cumsum()
            hit = np.searchsorted(line[:-1], (np.arange(extra) + rng.random()) * line[-1] / extra, side="right")
            repeat = np.arange(extra) - np.searchsorted(hit, hit) + 1  # 1, 2, ... of each image
            images = np.concatenate([images, hit + repeat * self.num_images])
        return rng.permutation(images)

    def _sorted(self, numbers: np.ndarray) -> np.ndarray:
        return numbers[np.argsort(self.aspect_ratios[numbers % self.num_images], kind="stable")]

    def numbered_batches(self) -> Iterator[list[int]]:
        """Like iteration, but the k-th repeat of image i is i + k * `num_images`, so each is augmented differently."""
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
            steps.append(self._sorted(rest))  # always the last, because it has fewer batches than the others
        for images in steps[first_step:]:
            parts = self._num_batches(len(images)) * self.world_size
            if len(images) < parts:  # every process needs a batch, or the others would wait for it forever
                images = np.resize(images, parts)
            for batch in np.array_split(images, parts)[self.rank :: self.world_size]:
                yield batch.tolist()
