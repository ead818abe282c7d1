import numpy as np
import pytest
from helpers import Ratios, in_memory

from retinanet.data.sampler import AspectRatioBasedSampler, epoch_size, repeat_factors

TEN = Ratios(np.linspace(0.5, 2, 10))


def as_sets(batches):
    return {frozenset(batch) for batch in batches}


def test_every_image_is_drawn_once_an_epoch():
    batches = list(AspectRatioBasedSampler(TEN, 3))
    assert sorted(index for batch in batches for index in batch) == list(range(10))
    assert sorted(map(len, batches)) == [1, 3, 3, 3]


def test_drop_last_drops_the_batch_that_is_not_full():
    sampler = AspectRatioBasedSampler(TEN, 3, drop_last=True)
    for _ in range(3):
        batches = list(sampler)
        assert [len(batch) for batch in batches] == [3, 3, 3] and len(sampler) == 3
        assert len({index for batch in batches for index in batch}) == 9
    assert list(AspectRatioBasedSampler(TEN, 11, drop_last=True)) == []


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 11])
def test_length_is_the_number_of_batches(batch_size, drop_last):
    sampler = AspectRatioBasedSampler(TEN, batch_size, drop_last)
    assert len(list(sampler)) == len(sampler)


def test_every_epoch_has_other_batches():
    sampler = AspectRatioBasedSampler(Ratios([1.0] * 40), 4)  # the original: the same groups for ever
    assert not as_sets(sampler) & as_sets(sampler)


@pytest.mark.parametrize("step", [{"batch_size": 4}, {"batch_size": 2, "accumulate": 16}])  # the latter: the last step
def test_the_images_of_a_batch_have_similar_shapes(step):
    data = Ratios([0.5, 2.0] * 8)
    batches = list(AspectRatioBasedSampler(data, **step))
    assert all(len({data.image_aspect_ratio(index) for index in batch}) == 1 for batch in batches)
    assert sorted(index for batch in batches for index in batch) == list(range(16))


def test_batches_of_all_shapes_are_spread_over_the_epoch():
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


# Rare classes


def shelf():
    """100 images: class a is in all but the last two, b is in four, and c is twice in one; the last two are empty."""
    rows = [(image, 0) for image in range(98)] + [(image, 1) for image in (0, 1, 2, 3)] + [(3, 2), (3, 2)]
    data = in_memory([[0, 0, 5, 5, label] for _, label in rows], [image for image, _ in rows], 100, ("a", "b", "c"))
    data.known_sizes[:] = 50, 100
    data.known_sizes[::3] = 100, 50
    return data


def test_repeat_factors_by_hand():
    factors = repeat_factors(shelf(), 0.16)
    # b: 4 of 100 images, sqrt(0.16 / 0.04) = 2; c: sqrt(0.16 / 0.01) = 4; a: 0.98 is above the threshold.
    assert factors.tolist() == pytest.approx([2, 2, 2, 4] + [1] * 96)
    assert epoch_size(factors) == 106
    assert repeat_factors(shelf(), 0.01).tolist() == repeat_factors(shelf(), None).tolist() == [1] * 100
    assert epoch_size(repeat_factors(shelf(), 0.09)) == 104  # 1.5 + 1.5 + 1.5 + 3 + 96 = 103.5
    assert repeat_factors(in_memory([], num_images=3), 0.5).tolist() == [1, 1, 1]


def test_classes_are_seen_as_often_as_their_factors_say():
    sampler, epochs = AspectRatioBasedSampler(shelf(), 4, balance=0.09), 400
    counts = np.zeros((epochs, 100), dtype=int)
    for count in counts:
        np.add.at(count, np.concatenate(list(sampler)), 1)
    assert (counts.sum(axis=1) == 104).all() and len(sampler) == 26
    # 4 repeats are drawn where the factors ask for 3.5, so each image is repeated 4 / 3.5 times as often.
    assert set(counts[:, 0]) <= {1, 2} and set(counts[:, 3]) <= {3, 4} and (counts[:, 4:] == 1).all()
    expected = 1 + np.array([0.5, 0.5, 0.5, 2]) * 4 / 3.5
    assert np.abs(counts[:, :4].mean(axis=0) - expected).max() < 0.1  # 4 standard deviations


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_balanced_epochs_have_one_length_on_all_ranks(world_size, accumulate, drop_last):
    options = {"batch_size": 4, "drop_last": drop_last, "accumulate": accumulate, "balance": 0.09}
    ranks = [
        AspectRatioBasedSampler(shelf(), rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for _ in range(3):
        shares = [list(sampler) for sampler in ranks]
        assert {len(share) for share in shares} == {len(ranks[0])}
        assert len({index for share in shares for batch in share for index in batch}) == 100 or drop_last


def test_balanced_ranks_see_step_by_step_what_one_process_sees():
    alone = list(AspectRatioBasedSampler(shelf(), 4, seed=3, balance=0.16).numbered_batches())
    shares = [
        list(AspectRatioBasedSampler(shelf(), 2, seed=3, rank=rank, world_size=2, balance=0.16).numbered_batches())
        for rank in (0, 1)
    ]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in alone]


def test_a_balanced_epoch_resumes_in_its_middle():
    sampler = AspectRatioBasedSampler(shelf(), 4, seed=1, balance=0.09)
    first, second = list(sampler.numbered_batches()), list(sampler.numbered_batches())
    assert first != second
    sampler.set_epoch(1, 7)
    assert list(sampler.numbered_batches()) == second[7:]


def test_every_repeat_has_a_number_of_its_own():
    sampler = AspectRatioBasedSampler(shelf(), 4, balance=0.16)
    for _ in range(5):
        numbers = sorted(number for batch in sampler.numbered_batches() for number in batch)
        assert numbers == [*range(100), 100, 101, 102, 103, 203, 303]


def test_an_epoch_of_tiles_shows_an_image_as_often_as_tiles_cover_it():
    data = in_memory([], num_images=3)
    data.known_sizes[:] = (100, 100), (201, 90), (50, 400)
    assert repeat_factors(data, None, tile=100).tolist() == [1, 3, 4]
    sampler = AspectRatioBasedSampler(data, 2, tile=100)
    numbers = sorted(number for batch in sampler.numbered_batches() for number in batch)
    assert numbers == [0, 1, 2, 4, 5, 7, 8, 11] and len(sampler) == 4
    assert (repeat_factors(shelf(), 0.16, tile=50) == 2 * repeat_factors(shelf(), 0.16)).all()


def test_balance_that_repeats_nothing_changes_nothing():
    plain, balanced = (AspectRatioBasedSampler(shelf(), 4, balance=balance) for balance in (None, 0.001))
    assert [list(plain) for _ in range(3)] == [list(balanced) for _ in range(3)]
