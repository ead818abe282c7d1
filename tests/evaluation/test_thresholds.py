import numpy as np
import pytest

from retinanet.evaluation.thresholds import Ranking, at_precision, best_f1, pooled, rates_above

# Right, wrong, right, right, wrong, wrong; of 4 boxes in 3 images, of which the third has none.
RANKING = Ranking(
    np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.3]),
    np.array([True, False, True, True, False, False]),
    np.array([0, 0, 1, 1, 2, 2]),
    np.array([2, 2, 0]),
)
NONE = Ranking(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=int), np.array([1, 0, 2]))


def test_the_best_f1_by_hand():
    point = best_f1(RANKING)
    assert 0.5 <= point.score < 0.6  # four detections: 3 right of 4 boxes
    assert (point.f1, point.precision, point.recall) == (0.75, 0.75, 0.75)
    assert (point.right, point.false, point.missed) == (3, 1, 1)
    assert (point.count_error, point.absolute_count_error) == (0, 0)  # two in the first two images, none in the third
    assert best_f1(NONE) is None and best_f1(RANKING._replace(right=np.zeros(6, dtype=bool))) is None


def test_the_lowest_score_of_a_precision_by_hand():
    # Precisions are 1, 1/2, 2/3, 3/4, 3/5, 1/2.
    for precision, count in ((1, 1), (0.76, 1), (0.75, 4), (0.61, 4), (0.6, 5), (0.5, 6)):
        point = at_precision(RANKING, precision)
        assert point.right + point.false == count and point.precision >= precision
    point = at_precision(RANKING, 1)
    assert (point.count_error, point.absolute_count_error) == (-1, 1)  # 1, 0, 0 for 2, 2, 0
    point = at_precision(RANKING, 0.5)
    assert (point.count_error, point.absolute_count_error) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert at_precision(RANKING._replace(right=np.arange(6) > 0), 0.9) is None
    assert at_precision(NONE, 0) is None


def test_rates_above_scores_by_hand():
    precision, recall, f1 = rates_above(RANKING, np.array([0, 0.3, 0.6, 0.65, 0.9]))
    np.testing.assert_allclose(precision, [3 / 6, 3 / 5, 2 / 3, 2 / 3, np.nan])  # scores must be above
    np.testing.assert_allclose(recall, [3 / 4, 3 / 4, 2 / 4, 2 / 4, 0])
    np.testing.assert_allclose(f1, [6 / 10, 6 / 9, 4 / 7, 4 / 7, 0])


def test_equal_scores_are_kept_or_dropped_together():
    ranking = RANKING._replace(scores=np.array([0.9, 0.5, 0.5, 0.5, 0.5, 0.3]))
    point = best_f1(ranking)
    assert (point.right, point.false) == (3, 2) and 0.3 <= point.score < 0.5


def test_all_classes_are_ranked_together():
    other = Ranking(np.array([0.85, 0.1]), np.array([True, False]), np.array([2, 0]), np.array([0, 0, 1]))
    both = pooled([RANKING, other])
    assert both.scores.tolist() == [0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1] and both.boxes.tolist() == [2, 2, 1]
    assert both.right.tolist() == [True, True, False, True, True, False, False, False]
    assert both.images.tolist() == [0, 2, 0, 1, 1, 2, 2, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [1, 1e-6, 1e-12, 1e30])
def test_a_threshold_reproduces_its_counts(dtype, spread):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = -np.sort(-(dtype(0.5) + rng.integers(0, 30, 25) * dtype(spread) / 60).astype(dtype))
        right, images = rng.random(25) < 0.6, rng.integers(0, 4, 25)
        ranking = Ranking(scores.astype(np.float64), right, images, np.full(4, 6))
        for point in (best_f1(ranking), at_precision(ranking, 0.4)):
            kept = scores > dtype(point.score)
            assert (right[kept].sum(), kept.sum()) == (point.right, point.right + point.false)
            f1 = 2 * point.right / (kept.sum() + 24)
            assert point.f1 == pytest.approx(f1) and best_f1(ranking).f1 >= f1


def test_thresholds_are_easy_to_type():
    assert best_f1(RANKING).score in (0.5, 0.55)
    last = best_f1(RANKING._replace(right=np.ones(6, dtype=bool), boxes=np.array([2, 2, 2])))
    assert 0.299 <= last.score < 0.3 and len(str(last.score)) <= 7  # a little below the lowest score


def test_scores_of_any_size_have_thresholds():
    for scores in ([np.inf, 1, 0], [1e300, -1e300, -np.inf], [np.inf] * 3, [0, 0, 0], [-1, -2, -3]):
        ranking = Ranking(np.array(scores, dtype=float), np.ones(3, dtype=bool), np.arange(3), np.ones(3, dtype=int))
        point = best_f1(ranking)
        assert point.right == 3 and not (point.score >= scores[-1] > -np.inf)
