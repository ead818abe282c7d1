import numpy as np
import pytest
from helpers import detections, in_memory

from retinanet.evaluation import coco
from retinanet.evaluation.errors import KINDS, analyse, confusion_table, error_table, judge

BOX = [0, 0, 100, 100]
OTHER = [200, 0, 300, 100]
TRUTH = [[*BOX, 0], [*OTHER, 1]]


def run(*rows, truth=TRUTH, difficult=None):
    """Analyse detections in one image: rows of score, label, x1, y1, x2, y2, best first."""
    return analyse(in_memory(truth, difficult=difficult), {0: detections(*rows)})


@pytest.mark.parametrize(
    "kind, wrong",
    [
        ("class", [0.9, 1, *BOX]),
        ("location", [0.9, 0, 0, 0, 100, 40]),
        ("both", [0.9, 1, 0, 0, 100, 40]),
        ("background", [0.9, 0, 500, 500, 600, 600]),
    ],
)
def test_each_kind_is_recognised(kind, wrong):
    analysis = run(wrong, [0.8, 1, *OTHER])
    counts = {name: analysis.counts[name] for name in KINDS if name != "missed"}
    assert counts == {name: int(name == kind) for name in counts}
    # BOX is missed, unless the wrong detection could have found it.
    assert analysis.counts["missed"] == (kind not in ("class", "location"))


def test_duplicates_are_recognised():
    analysis = run([0.9, 0, *BOX], [0.8, 0, *BOX], [0.7, 1, *OTHER])
    assert analysis.counts == {**dict.fromkeys(KINDS, 0), "duplicate": 1}
    assert analysis.ap50 == 1 and analysis.lost["duplicate"] == 0  # it comes after the box was found


def test_fixing_by_hand():
    # a: a wrong one on nothing before the right one, so precision 1/2 throughout; b: never found.
    analysis = run([0.9, 0, 500, 500, 600, 600], [0.8, 0, *BOX])
    assert analysis.ap50 == pytest.approx(0.25)
    assert analysis.lost["background"] == pytest.approx(0.25)  # a becomes 1
    assert analysis.lost["missed"] == pytest.approx(0.25)  # b is not counted, so the mean is a's 1/2
    assert analysis.lost["class"] == 0


def test_fixing_a_class_makes_the_best_candidate_right():
    analysis = run([0.9, 1, *BOX], [0.8, 1, *BOX], [0.7, 1, *OTHER])
    assert analysis.counts["class"] == 2
    # a: 0 -> 1, as the better of the two becomes its detection. b: 1/3 -> 1, as the others are removed.
    assert analysis.lost["class"] == pytest.approx((1 - 0 + 1 - 1 / 3) / 2)


def test_ap50_is_cocos():
    rng = np.random.default_rng(0)
    truth = [[x, y, x + 60, y + 60, label] for x, y, label in rng.integers(0, [400, 400, 2], (12, 3))]
    rows = [
        [score, truth[i % 12][4], *(np.array(truth[i % 12][:4]) + rng.normal(0, 9, 4)).tolist()]
        for i, score in enumerate(np.linspace(0.99, 0.1, 40).tolist())
    ]
    dataset, found = in_memory(truth, difficult=np.arange(12) % 4 == 3), {0: detections(*rows)}
    expected = coco.score(dataset, found).metrics["AP50"]
    assert 0.1 < expected < 1
    assert analyse(dataset, found).ap50 == pytest.approx(expected, abs=1e-12)


def test_confusion_matrix():
    analysis = run([0.9, 1, *BOX], [0.8, 0, 500, 500, 600, 600], [0.4, 1, *OTHER])
    assert analysis.confusion.tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]]  # the last detection is below 0.5
    table = confusion_table(analysis, ["a", "b"])
    for text in ("of scores above 0.5", "1 x  a found as b", "1 x  b missed", "1 x  a found in the background"):
        assert text in table


def test_difficult_boxes_are_ignored():
    analysis = run([0.9, 0, *BOX], truth=TRUTH, difficult=np.array([True, False]))
    assert analysis.counts == {**dict.fromkeys(KINDS, 0), "missed": 1}


def test_in_a_crowd_only_what_finds_a_box_counts():
    crowd = np.array([False, True])
    rows = [0.9, 0, *BOX], [0.8, 0, *BOX], [0.7, 0, 200, 0, 220, 20], [0.6, 1, 200, 0, 220, 20]
    data = [[*BOX, 0], [0, 0, 300, 300, 0]]
    analysis = run(*rows, truth=data, difficult=crowd)
    assert analysis.ap50 == 1 and analysis.counts == {**dict.fromkeys(KINDS, 0), "background": 1}  # of class b
    assert analysis.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_nothing_found_and_nothing_there():
    assert run().counts["missed"] == 2
    analysis = run(truth=[])
    assert analysis.ap50 == 0 and not any(analysis.counts.values())
    assert all(kind in error_table(analysis) for kind in KINDS)


def test_a_hundred_detections_of_each_class_count():
    wrong = [[0.9, 0, 500, 500, 600, 600]] * 100
    # BOX comes too late, OTHER does not.
    rows = *wrong, [0.8, 1, *OTHER], [0.7, 0, *BOX]
    assert run(*rows).ap50 == pytest.approx(0.5)
    assert analyse(in_memory(TRUTH), {0: detections(*rows)}, limit=101).ap50 == pytest.approx((1 + 1 / 101) / 2)


def test_judge():
    found = {0: detections([0.9, 0, *BOX], [0.8, 0, *BOX], [0.7, 0, *OTHER], [0.3, 1, *OTHER])}
    _, right, hit = judge(in_memory(TRUTH), found)[0]
    assert right.tolist() == [True, False, False, True] and hit.tolist() == [True, True]
    above, right, hit = judge(in_memory(TRUTH), found, score_threshold=0.75)[0]
    assert len(above.scores) == len(above.boxes) == 2
    assert right.tolist() == [True, False] and hit.tolist() == [True, False]
    _, right, hit = judge(in_memory([]), found)[0]
    assert not right.any() and hit.shape == (0,)
