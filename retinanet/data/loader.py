"""Samples -> batches, read by worker processes."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from retinanet.data.dataset import DetectionDataset
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.samples import transform_name
from retinanet.data.tiles import Tiling
from retinanet.data.transforms import Resizer, pad_images
from retinanet.errors import UserError
from retinanet.process import get_rank, get_world_size, seeded
from retinanet.signals import guard_worker, held, resume_workers

WAIT = 5  # seconds without a batch after which stopped workers are resumed
MAX_WAITS = 36  # such waits in a row before an error ends the program


def collater(data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples into a batch, with images and annotations padded to the largest.

    `img` [H, W, 3] becomes [B, 3, H, W] in its dtype; `annot` [G, 5] becomes [B, G, 5] float32 with rows of -1 as
    padding (G is at least 1). Other entries that all samples have become lists: `scale`, `size`, `index`.
    """
    images = [torch.as_tensor(sample["img"]).permute(2, 0, 1) for sample in data]  # [3, H, W] each
    if len(dtypes := {str(image.dtype) for image in images}) > 1:
        raise UserError(f"images of one batch are {' and '.join(sorted(dtypes))}; normalise all of them or none")
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    annotations = [torch.as_tensor(sample["annot"], dtype=torch.float32) for sample in data]
    padded = torch.full((len(data), max([1, *map(len, annotations)]), 5), -1.0, dtype=torch.float32)
    for row, boxes in zip(padded, annotations, strict=True):
        row[: len(boxes)] = boxes
    keys = [key for key in data[0] if key not in ("img", "annot") and all(key in sample for sample in data)]
    others = {key: [sample[key] for sample in data] for key in keys}
    return {"img": pad_images(images, height, width), "annot": padded, **others}


def read_sample(dataset: Dataset, seed: int, epoch: int, number: int) -> dict[str, Any]:
    """A sample as training augments it, which depends on the seed, the epoch and the number alone.

    The number is the sample's index, or that of a repeat, see `AspectRatioBasedSampler.numbered_batches`.
    """
    with seeded(seed, epoch, number):
        return dataset[number % len(dataset)]


@dataclass
class _KeySampler:
    """The batches of an AspectRatioBasedSampler, as the arguments of `read_sample` for each sample."""

    sampler: AspectRatioBasedSampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        seed, epoch = self.sampler.seed, self.sampler.epoch
        for batch in self.sampler.numbered_batches():
            yield [(seed, epoch, number) for number in batch]


class _Reader(Dataset):
    """The batches of a data set; a key is a sample's index, or the arguments (seed, epoch, number) of `read_sample`."""

    def __init__(self, dataset: DetectionDataset, workers: int):
        self.dataset = dataset
        # What each worker reads: its process id, and an index or -1. Shared, so that it outlives a dead worker.
        self.reading = torch.full((max(1, workers), 2), -1).share_memory_()

    def __getitem__(self, keys: Sequence[int] | Sequence[tuple[int, int, int]]) -> dict[str, Any] | UserError:
        worker = get_worker_info()
        state, samples = self.reading[worker.id if worker else 0], []
        try:
            for key in keys:
                augmented = isinstance(key, tuple)
                index = key[-1] % len(self.dataset) if augmented else key
                state[:] = torch.tensor([os.getpid(), index])
                samples.append(read_sample(self.dataset, *key) if augmented else self.dataset[index])
            return collater(samples)
        except UserError as error:
            return error  # _Loader raises it, because DataLoader would keep only the text of a worker's traceback
        finally:
            state[1] = -1


def _unchanged(batch: dict[str, Any] | UserError) -> dict[str, Any] | UserError:  # `_Reader` has collated it
    return batch


class _Loader(DataLoader):
    """A DataLoader that raises the errors of its workers as they were raised there."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with held():  # because workers start here
            batches = super().__iter__()
        waited = 0
        while True:
            try:
                batch = next(batches, None)
            except RuntimeError as error:
                waited += 1  # a count, not a time, because the whole program may have been stopped and continued
                if "timed out" not in str(error) or waited == MAX_WAITS:
                    raise
                resume_workers()
                continue
            if batch is None:
                return
            if isinstance(batch, UserError):
                raise batch
            waited = 0
            yield batch

    def explain_death(self, message: str) -> str | None:
        """A message that says what a dead worker was reading; None if DataLoader's message is about something else."""
        reader = self.dataset
        reading = {pid: reader.dataset.image_path(index) for pid, index in reader.reading.tolist() if index >= 0}
        if "DataLoader timed out" in message:
            names = ", ".join(reading.values()) or "nothing"
            return f"no batch came in {MAX_WAITS * WAIT} s while data-loading workers read {names}"
        found = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)", message)
        if found is None:
            return None
        paths = [reading[pid] for pid in map(int, found[1].split(",")) if pid in reading]
        return (
            f"a data-loading worker {found[2].strip().rstrip('.')} while it read {', '.join(paths) or 'nothing'}: "
            "check that image, or lower --workers if memory ran out"
        )


@dataclass
class _TiledLoader:
    """The batches of `whole`, then batches of tiles of the larger images, read one at a time in this process.

    A batch of tiles holds tiles of one image, in order, and their places as `tile`, see `Tiling.batches`.
    """

    whole: _Loader
    dataset: DetectionDataset
    large: Sequence[int]
    tiling: Tiling
    batch_size: int

    def __len__(self) -> int:
        counts = [self.tiling.count(*self.dataset.image_sizes[index]) for index in self.large]
        return len(self.whole) + sum(-(-count // self.batch_size) for count in counts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.whole
        for index in self.large:
            image = self.dataset.open_image(index)
            for batch in self.tiling.batches(image, self.batch_size):
                yield {**batch, "index": [index] * len(batch["tile"])}


def make_loader(
    dataset: DetectionDataset,
    batch_size: int,
    workers: int = 0,
    batch_sampler: AspectRatioBasedSampler | None = None,
    indices: Sequence[int] | None = None,
    device: torch.device | None = None,
    tiling: Tiling | None = None,
) -> "_Loader | _TiledLoader":
    """A loader of batches: those of `batch_sampler` for training, otherwise all samples, or `indices` in order.

    With a sampler, augmentations depend on its seed, the epoch and the image alone. Without one, all samples are sorted
    by shape, so that the images of a batch need little padding, and each process of a torchrun job gets its share of
    the batches; `detection.detect` gathers the detections.

    Args:
        batch_size: images per batch; ignored, like `indices` and `tiling`, with a `batch_sampler`.
        workers: number of processes that read images; with 0, this process reads them.
        batch_sampler: the samples of each batch.
        indices: which samples; default: all.
        device: where the batches will go; for CUDA they are put into pinned memory.
        tiling: images larger than its tiles come after all others, as batches of their tiles.
    """
    large = []
    if batch_sampler is not None:
        batches = _KeySampler(batch_sampler)
    else:
        chosen = range(len(dataset)) if indices is None else indices
        if indices is None and batch_size > 1:
            chosen = sorted(chosen, key=dataset.image_aspect_ratio)
        if tiling is not None:
            sizes = dataset.image_sizes
            large = [index for index in chosen if not tiling.fits(*sizes[index])]
            chosen = [index for index in chosen if tiling.fits(*sizes[index])]
        batches = [list(chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
        batches = batches[get_rank() :: get_world_size()]
        workers = min(workers, len(batches))
    loader = _Loader(
        _Reader(dataset, workers),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=device is not None and device.type == "cuda",
        persistent_workers=workers > 0,
        timeout=WAIT if workers else 0,
        worker_init_fn=guard_worker,
        generator=torch.Generator(),  # the default, the global one, would give resumed runs other random numbers
    )
    if not large:
        return loader
    if not isinstance(dataset.transform, Resizer | None):
        name = transform_name(dataset.transform)
        raise UserError(f"tiles are not passed through the data set's transform {name}: use only one of them")
    return _TiledLoader(loader, dataset, large[get_rank() :: get_world_size()], tiling, batch_size)


class WorkerDiedError(UserError):
    """A data-loading worker ended unexpectedly."""


@contextlib.contextmanager
def explained(loader: Iterable, precision: torch.dtype) -> Iterator[dict[str, Any]]:
    """Turn errors about memory and dead workers into messages that say what to do.

    It yields a dict, in which the body must store the `shape` of its current batch.
    """
    seen: dict[str, Any] = {}
    try:
        yield seen
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            if "shape" not in seen:
                raise UserError("out of memory while images were read: lower --workers or shrink the images") from error
            batch, _, height, width = seen["shape"]
            raise UserError(
                f"out of memory with {batch} images of {height} x {width} pixels a batch in {precision}: lower "
                "--batch_size (and in training raise --accumulate) or the size of the images, or use --precision bf16"
            ) from error
        loader = loader.whole if isinstance(loader, _TiledLoader) else loader
        if isinstance(loader, _Loader) and (message := loader.explain_death(str(error))):
            raise WorkerDiedError(message) from error
        raise


@contextlib.contextmanager
def transformed(
    dataset: DetectionDataset | None, transform: Callable[[dict], dict], by_parts: bool = False
) -> Iterator[None]:
    """Within the context, a data set without a transform has this one; `by_parts` gives it images of `open_image`."""
    if dataset is None or dataset.transform is not None:
        yield
        return
    dataset.transform, dataset.by_parts = transform, by_parts
    try:
        yield
    finally:
        dataset.transform, dataset.by_parts = None, False
