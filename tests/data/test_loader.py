import multiprocessing
import pickle
import random

import numpy as np
import pytest
import torch
from helpers import gradient, truncate, write_csv_data
from torchvision.transforms import Compose

import retinanet.dataloader
from retinanet.data.csv import CSVDataset
from retinanet.data.loader import collater, make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.transforms import Augmenter, Resizer, pad_value
from retinanet.errors import UserError


class Ratios:
    """A data set that knows the shapes of its pictures alone."""

    def __init__(self, ratios):
        self.ratios = ratios

    def __len__(self):
        return len(self.ratios)

    def image_aspect_ratio(self, index):
        return self.ratios[index]


TEN = Ratios(np.linspace(0.5, 2, 10))


def as_sets(batches):
    return {frozenset(batch) for batch in batches}


def sample_of(height, width, num_boxes, **others):
    return {"img": gradient(height, width), "annot": np.full((num_boxes, 5), 3.0), **others}


# Batches


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


def test_float_pictures_are_padded_with_zeros():
    samples = [{"img": torch.ones(size, size, 3), "annot": torch.zeros(0, 5)} for size in (2, 4)]
    batch = collater(samples)["img"]
    assert batch.dtype == torch.float32
    assert batch[0].sum() == 3 * 2 * 2 and batch[1].sum() == 3 * 4 * 4


def test_a_batch_without_boxes_has_one_row_of_padding():
    assert collater([sample_of(4, 4, 0), sample_of(4, 4, 0)])["annot"].tolist() == [[[-1] * 5]] * 2


def test_the_originals_imports_work():
    for name in retinanet.dataloader.__all__:
        assert hasattr(retinanet.dataloader, name)
    assert {"CocoDataset", "CSVDataset", "Normalizer", "UnNormalizer"} <= set(retinanet.dataloader.__all__)


# The sampler


def test_every_picture_is_drawn_once_an_epoch():
    batches = list(AspectRatioBasedSampler(TEN, 3))
    assert sorted(index for batch in batches for index in batch) == list(range(10))
    assert sorted(map(len, batches)) == [1, 3, 3, 3]


def test_drop_last_drops_the_batch_that_is_not_full():
    sampler = AspectRatioBasedSampler(TEN, 3, drop_last=True)
    for _ in range(3):
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [3, 3, 3] and len(sampler) == 3
        assert len({index for batch in batches for index in batch}) == 9


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 11])
def test_length_is_the_number_of_batches(batch_size, drop_last):
    sampler = AspectRatioBasedSampler(TEN, batch_size, drop_last)
    assert len(list(sampler)) == len(sampler)


def test_every_epoch_groups_anew_though_batches_are_of_similar_shape():
    sampler = AspectRatioBasedSampler(Ratios([1.0] * 40), 4)  # the original: the same groups for ever
    assert not as_sets(sampler) & as_sets(sampler)


def test_batches_are_of_similar_shape():
    data = Ratios([0.5, 2.0] * 32)
    for batch in AspectRatioBasedSampler(data, 4):
        assert len({data.image_aspect_ratio(index) for index in batch}) == 1


def test_batches_of_all_shapes_come_at_all_times():
    sampler = AspectRatioBasedSampler(Ratios(np.linspace(0.5, 2, 40)), 4)
    first = [min(next(iter(sampler))) for _ in range(20)]
    assert len(set(first)) > 5


def test_the_order_follows_from_seed_and_epoch():
    first, second, other = (AspectRatioBasedSampler(TEN, 2, seed=seed) for seed in (1, 1, 2))
    epochs = [list(first) for _ in range(3)]
    assert epochs == [list(second) for _ in range(3)]
    assert epochs[0] != list(other)
    second.set_epoch(1)
    assert list(second) == epochs[1] != epochs[0]


def test_the_global_generator_is_left_alone():
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    list(AspectRatioBasedSampler(TEN, 2))
    assert np.random.rand() == expected


def test_two_ranks_see_step_by_step_what_one_process_with_twice_the_batch_sees():
    alone = list(AspectRatioBasedSampler(Ratios([1.0] * 12), 2, seed=3))
    shares = [list(AspectRatioBasedSampler(Ratios([1.0] * 12), 1, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 11])
def test_ranks_have_equally_many_batches(world_size):
    """Ranks that wait for each other would wait for ever."""
    samplers = [AspectRatioBasedSampler(TEN, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])} == {-(-3 // world_size)}
    assert {index for share in shares for batch in share for index in batch} == set(range(10))
    assert all(batch for share in shares for batch in share)


@pytest.mark.parametrize("num_images", [12, 24, 26])
def test_processes_and_accumulation_divide_the_same_steps(num_images):
    data = Ratios(np.linspace(0.5, 2, num_images))

    def steps(batch_size, world_size, accumulate):
        shares = [
            list(AspectRatioBasedSampler(data, batch_size, False, 3, rank, world_size, accumulate))
            for rank in range(world_size)
        ]
        return [
            sorted({i for share in shares for batch in share[start : start + accumulate] for i in batch})
            for start in range(0, len(shares[0]), accumulate)
        ]

    expected = steps(12, 1, 1)
    assert [len(step) for step in expected] == [12] * (num_images // 12) + [2] * (num_images % 12 > 0)
    for division in ((6, 2, 1), (6, 1, 2), (3, 2, 2), (1, 4, 3)):
        assert steps(*division) == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_can_start_in_its_middle(accumulate):
    sampler = AspectRatioBasedSampler(TEN, 2, seed=1, accumulate=accumulate)
    whole, following = list(sampler), list(sampler)
    sampler.set_epoch(0, 2)
    assert list(sampler) == whole[2 * accumulate :]
    assert list(sampler) == following and len(sampler) == 5
    sampler.set_epoch(0, -(-5 // accumulate))
    assert list(sampler) == []


def test_drop_last_with_too_few_pictures_gives_no_batch():
    sampler = AspectRatioBasedSampler(TEN, 11, drop_last=True)
    assert list(sampler) == [] and len(sampler) == 0


# Loaders


@pytest.fixture
def data(tmp_path):
    return CSVDataset(*write_csv_data(tmp_path), transform=Resizer(32, 64))


def test_a_loader_counts_every_picture_and_sorts_batches_by_shape(data):
    batches = list(make_loader(data, 2))
    assert [batch["index"] for batch in batches] == [[1, 0]]  # upright, then lying
    assert set(batches[0]) == {"img", "annot", "index", "scale", "size"}
    assert [batch["index"] for batch in make_loader(data, 1)] == [[0], [1]]


def test_a_loader_can_be_limited_to_some_pictures(data):
    assert [batch["index"] for batch in make_loader(data, 2, indices=[1])] == [[1]]
    assert [batch["index"] for batch in make_loader(data, 2, indices=range(0))] == []


def test_a_loader_draws_from_the_sampler(data):
    loader = make_loader(data, 1, batch_sampler=AspectRatioBasedSampler(data, 1))
    drawn = [tuple(batch["index"][0] for batch in loader) for _ in range(12)]
    assert len(loader) == 2 and set(drawn) == {(0, 1), (1, 0)}


def test_a_worker_reads_what_this_process_reads(data):
    (here,), (there,) = list(make_loader(data, 2)), list(make_loader(data, 2, workers=1))
    assert torch.equal(here["img"], there["img"]) and torch.equal(here["annot"], there["annot"])
    assert here["size"] == there["size"] and here["scale"] == there["scale"]


def test_augmentations_change_every_epoch_and_follow_from_the_seed_whoever_reads(data):
    data.transform = Compose([Augmenter(), Resizer(32, 64)])

    def flips(workers, seed):
        loader = make_loader(data, 1, workers, AspectRatioBasedSampler(data, 1, seed=seed))
        epochs = [{batch["index"][0]: batch["annot"][0, 0, 0].item() for batch in loader} for _ in range(12)]
        return [epoch[0] for epoch in epochs]  # where the first picture's first box begins

    torch.manual_seed(1)
    here = flips(workers=0, seed=3)
    torch.manual_seed(2)
    assert len(set(here)) == 2
    assert flips(workers=1, seed=3) == here
    assert flips(workers=0, seed=4) != here


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


def test_a_training_loader_leaves_the_global_generators_alone():
    data = Noise([1.0] * 4)
    loader = make_loader(data, 2, 0, AspectRatioBasedSampler(data, 2))
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = data[0]["numbers"]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    list(loader)
    assert data[0]["numbers"] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_processes_share_the_batches_of_one_for_detection(monkeypatch, world_size):
    data = Noise([1.0] * 10)
    alone = [batch["index"] for batch in make_loader(data, 2)]
    monkeypatch.setattr(retinanet.data.loader, "get_world_size", lambda: world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(retinanet.data.loader, "get_rank", lambda rank=rank: rank)
        shares += [batch["index"] for batch in make_loader(data, 2)]
    assert sorted(shares) == alone  # each picture once, and in the same company


def test_a_dead_worker_is_explained(data):
    reader = make_loader(data, 1, workers=2).dataset
    reader.reading[0] = torch.tensor([40, 0])
    reader.reading[1] = torch.tensor([41, 1])
    message = reader.explain_death("DataLoader worker (pid 41) is killed by signal: Killed. ")
    assert message.startswith("a data-loading worker is killed by signal: Killed while it read ") and "b.png" in message
    message = reader.explain_death("DataLoader worker (pid(s) 40, 41) exited unexpectedly")
    assert "exited unexpectedly while it read" in message and "a.png" in message and "b.png" in message
    assert reader.explain_death("something else") is None


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_stops_the_loader_with_its_name(tmp_path, workers):
    data = CSVDataset(*write_csv_data(tmp_path), transform=Resizer(32, 64))
    truncate(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: cannot be read as a picture"):
        list(make_loader(data, 1, workers=workers))


def test_a_data_set_with_its_transforms_can_be_sent_to_a_worker(data):
    data.transform = Compose([Augmenter(), Resizer(32, 64)])
    assert tuple(pickle.loads(pickle.dumps(data))[0]["img"].shape) == (32, 64, 3)


def test_a_worker_that_is_asked_to_end_ends(data):
    """One that did not would keep the whole program from ending."""
    batches = iter(make_loader(data, 1, workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(timeout=10)
    assert not worker.is_alive()


def test_the_last_step_is_sorted_by_shape_too():
    class Data:
        def __len__(self):
            return 12

        def image_aspect_ratio(self, index):
            return 0.5 + index % 2

    batches = list(AspectRatioBasedSampler(Data(), 2, accumulate=16))
    assert all(len({index % 2 for index in batch}) == 1 for batch in batches)
    assert sorted(index for batch in batches for index in batch) == list(range(12))
