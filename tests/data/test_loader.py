import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import Ratios, detections, gradient, truncate, write_csv_data
from torchvision.transforms import Compose

from retinanet.data import loader as loaders
from retinanet.data.csv import CSVDataset
from retinanet.data.loader import collater, explained, make_loader, read_sample
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.shapes import ShapesDataset
from retinanet.data.tiles import Tiling
from retinanet.data.transforms import Augmenter, Normalizer, RandomCrop, Resizer, pad_value
from retinanet.detection import detect
from retinanet.errors import UserError


def sample_of(height, width, num_boxes, **others):
    return {"img": gradient(height, width), "annot": np.full((num_boxes, 5), 3.0), **others}


def test_collater_by_hand():
    small, large = sample_of(4, 8, 1, scale=0.5), sample_of(6, 5, 3, scale=2.0)
    batch = collater([small, large])
    assert tuple(batch["img"].shape) == (2, 3, 6, 8) and batch["img"].dtype == torch.uint8
    np.testing.assert_array_equal(batch["img"][0, :, :4].permute(1, 2, 0), small["img"])
    np.testing.assert_array_equal(batch["img"][1, :, :, :5].permute(1, 2, 0), large["img"])
    mean = pad_value(torch.uint8)[:, None, None]
    assert (batch["img"][0, :, 4:] == mean).all() and (batch["img"][1, :, :, 5:] == mean).all()
    assert tuple(batch["annot"].shape) == (2, 3, 5) and batch["annot"].dtype == torch.float32
    assert batch["annot"][:, :, 0].tolist() == [[3, -1, -1], [3, 3, 3]]
    assert batch["scale"] == [0.5, 2.0]


def test_float_images_are_padded_with_zeros():
    samples = [{"img": torch.ones(size, size, 3), "annot": torch.zeros(0, 5)} for size in (2, 4)]
    batch = collater(samples)["img"]
    assert batch.dtype == torch.float32
    assert batch[0].sum() == 3 * 2 * 2 and batch[1].sum() == 3 * 4 * 4


def test_a_batch_without_boxes_has_one_row_of_padding():
    assert collater([sample_of(4, 4, 0), sample_of(4, 4, 0)])["annot"].tolist() == [[[-1] * 5]] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_normalised_and_other_images_in_one_batch_are_an_error(tmp_path, workers):
    half = CSVDataset(*write_csv_data(tmp_path), lambda sample: Normalizer()(sample) if sample["index"] else sample)
    with pytest.raises(UserError, match=r"images of one batch are torch\.float32 and torch\.uint8; normalise all"):
        list(make_loader(half, 2, workers))


def test_entries_that_only_some_samples_have_are_left_out():
    assert collater([sample_of(4, 4, 0, index=1), sample_of(4, 4, 0, index=2, flipped=True)])["index"] == [1, 2]


class Blind(torch.nn.Module):
    """A detector that finds nothing."""

    def detect(self, images, image_sizes):
        assert image_sizes == [tuple(image.shape[1:]) for image in images]
        return [detections()] * len(images)


def test_a_data_set_without_a_resizer_can_be_detected_in_unless_its_images_change_their_size(tmp_path):
    device, net = torch.device("cpu"), Blind()
    plain = CSVDataset(*write_csv_data(tmp_path), transform=lambda sample: sample)
    assert sorted(detect(net, make_loader(plain, 1), device)) == [0, 1]
    plain.transform = lambda sample: {**sample, "img": sample["img"][::2, ::2], "annot": sample["annot"][:0]}
    with pytest.raises(UserError, match=r"no scale and size: .* with Resizer"):
        detect(net, make_loader(plain, 1), device)
    with pytest.raises(UserError, match=r"tiles are not passed through the data set's transform .*<lambda>"):
        make_loader(plain, 1, tiling=Tiling(32))


@pytest.fixture
def data(tmp_path):
    return CSVDataset(*write_csv_data(tmp_path), transform=Resizer(32, 64))


def test_a_loader_counts_every_image_and_sorts_batches_by_shape(data):
    batches = list(make_loader(data, 2))
    assert [batch["index"] for batch in batches] == [[1, 0]]  # upright, then lying
    assert set(batches[0]) == {"img", "annot", "index", "scale", "size"}
    assert [batch["index"] for batch in make_loader(data, 1)] == [[0], [1]]


def test_a_loader_can_be_limited_to_some_images(data):
    assert [batch["index"] for batch in make_loader(data, 2, indices=[1])] == [[1]]
    assert [batch["index"] for batch in make_loader(data, 2, indices=range(0))] == []


def test_there_are_no_more_workers_than_batches(data):
    assert [make_loader(data, size, workers=4).num_workers for size in (1, 2)] == [2, 1]
    assert make_loader(data, 1, workers=4, indices=range(0)).num_workers == 0


def test_a_loader_draws_from_the_sampler(data):
    loader = make_loader(data, 1, batch_sampler=AspectRatioBasedSampler(data, 1))
    drawn = [tuple(batch["index"][0] for batch in loader) for _ in range(12)]
    assert len(loader) == 2 and set(drawn) == {(0, 1), (1, 0)}


def test_a_worker_reads_the_same_as_this_process(data):
    (here,), (there,) = list(make_loader(data, 2)), list(make_loader(data, 2, workers=1))
    assert torch.equal(here["img"], there["img"]) and torch.equal(here["annot"], there["annot"])
    assert here["size"] == there["size"] and here["scale"] == there["scale"]


class Noise(Ratios):
    """Each sample is drawn from all three generators."""

    def __getitem__(self, index):
        numbers = [random.random(), np.random.rand(), torch.rand(1).item()]
        return {"img": np.zeros((1, 1, 3), np.uint8), "annot": np.zeros((0, 5)), "index": index, "numbers": numbers}


def test_augmentations_follow_from_seed_epoch_and_image_alone():
    data = Noise([1.0] * 6)

    def draw(batch_size, workers, epoch, seed=1):
        sampler = AspectRatioBasedSampler(data, batch_size, seed=seed)
        sampler.set_epoch(epoch)
        found = [
            (index, numbers)
            for batch in make_loader(data, batch_size, workers, sampler)
            for index, numbers in zip(batch["index"], batch["numbers"], strict=True)
        ]
        return sorted(found)

    expected = draw(2, 0, 0)
    assert draw(3, 2, 0) == expected
    every = [numbers for found in (expected, draw(2, 0, 1), draw(2, 0, 0, seed=2)) for _, numbers in found]
    assert len({number for numbers in every for number in numbers}) == 3 * 3 * 6  # no two are alike
    assert [(index, read_sample(data, 1, 0, index)["numbers"]) for index in range(6)] == expected


def test_a_training_loader_leaves_the_global_generators_alone():
    data = Noise([1.0] * 4)
    loader = make_loader(data, 2, 0, AspectRatioBasedSampler(data, 2))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = data[0]["numbers"]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    list(loader)
    assert data[0]["numbers"] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_processes_share_the_batches_of_a_single_process_for_detection(monkeypatch, world_size):
    data = Noise([1.0] * 10)
    alone = [batch["index"] for batch in make_loader(data, 2)]
    monkeypatch.setattr(loaders, "get_world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(loaders, "get_rank", lambda rank=rank: rank)
        shares += [batch["index"] for batch in make_loader(data, 2)]
    assert sorted(shares) == alone  # each image once, in the same batches


def test_a_dead_worker_is_explained(data):
    loader = make_loader(data, 1, workers=2)
    loader.dataset.reading[:] = torch.tensor([[40, 0], [41, 1]])
    message = loader.explain_death("DataLoader worker (pid 41) is killed by signal: Killed. ")
    assert message.startswith("a data-loading worker is killed by signal: Killed while it read ") and "b.png" in message
    message = loader.explain_death("DataLoader worker (pid(s) 40, 41) exited unexpectedly")
    assert "exited unexpectedly while it read" in message and "a.png" in message and "b.png" in message
    assert loader.explain_death("something else") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_stops_the_loader_with_its_name(tmp_path, workers):
    data = CSVDataset(*write_csv_data(tmp_path), transform=Resizer(32, 64))
    truncate(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as an image"):
        list(make_loader(data, 1, workers=workers))


def test_a_data_set_with_its_transforms_can_be_sent_to_a_worker(data):
    data.transform = Compose([Augmenter(), Resizer(32, 64)])
    assert tuple(pickle.loads(pickle.dumps(data))[0]["img"].shape) == (32, 64, 3)


@pytest.fixture
def worker(data, monkeypatch):
    """The batches of a loader with one worker, and that worker's process."""
    monkeypatch.setattr(loaders, "WAIT", 0.1)
    others = multiprocessing.active_children()
    batches = iter(make_loader(data, 1, workers=1))
    next(batches)
    (process,) = set(multiprocessing.active_children()) - set(others)
    return batches, process


def test_a_signal_to_the_whole_job_does_not_end_a_worker(worker):
    batches, process = worker
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(process.pid)], check=True)
    process.join(timeout=0.3)
    assert process.is_alive() and next(batches)["index"] == [1]


def test_a_stopped_worker_is_resumed(monkeypatch):
    monkeypatch.setattr(loaders, "WAIT", 0.1)
    batches = iter(make_loader(Noise([1.0] * 9), 1, workers=1))
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGSTOP)
    assert [batch["index"] for batch in batches] == [[index] for index in range(9)]


def test_a_loader_that_times_out_says_what_it_reads(data, monkeypatch):
    monkeypatch.setattr(loaders, "WAIT", 0.25)
    monkeypatch.setattr(loaders, "MAX_WAITS", 4)
    monkeypatch.setattr(CSVDataset, "load_image", lambda *_: time.sleep(2))
    loader = make_loader(data, 1, workers=1)
    message = r"^no batch came in 1.* s while data-loading workers read .*a\.png$"
    with pytest.raises(UserError, match=message), explained(loader, torch.float32):
        next(iter(loader))


def test_a_worker_can_be_terminated(worker):
    """Otherwise the whole program could not end."""
    _, process = worker
    process.terminate()
    process.join(timeout=10)
    assert not process.is_alive()


@pytest.mark.parametrize("workers", [0, 1])
def test_repeats_of_an_image_are_augmented_differently(workers):
    data = ShapesDataset(4, seed=1, transform=Compose([RandomCrop(0.3), Resizer(32, 64)]))
    data.annotations[:, 4] = data.image_index == 0  # a class of image 0 alone: sqrt(0.5 / 0.25) = 1.4
    sampler = AspectRatioBasedSampler(data, 5, seed=2, balance=0.5)
    (numbers,) = sampler.numbered_batches()
    sampler.set_epoch(0)
    (batch,) = make_loader(data, 5, workers, batch_sampler=sampler)
    assert batch["index"] == [number % 4 for number in numbers] and sorted(numbers) == [0, 1, 2, 3, 4]
    first, second = (batch["img"][numbers.index(number)] for number in (0, 4))
    assert not torch.equal(first, second)
