import logging

import numpy as np
import pytest
import torch
from helpers import detections, in_memory
from torch import nn

from retinanet.data.dataset import DetectionDataset
from retinanet.data.transforms import Resizer
from retinanet.evaluation import voc
from retinanet.evaluation.voc import VOC07_RECALLS, average_precision, evaluate_detections, mean_average_precision

BOX, FAR = [0, 0, 10, 10], [50, 50, 60, 60]
TWO = in_memory([[*BOX, 0], [*FAR, 0]], [0, 1], num_images=2)


def test_the_ground_truth_scores_one():
    results = evaluate_detections(TWO, {0: detections([0.9, 0, *BOX]), 1: detections([0.8, 0, *FAR])})
    assert results[0][:4] == (1, 2, 1, 1)


def test_average_precision_by_hand():
    # right, wrong, right: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
    found = {0: detections([0.9, 0, *BOX], [0.8, 0, *FAR]), 1: detections([0.7, 0, *FAR])}
    result = evaluate_detections(TWO, found)[0]
    assert result.average_precision == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert result.precision == pytest.approx(2 / 3) and result.recall == 1
    eleven = evaluate_detections(TWO, found, eleven_points=True)[0]
    assert eleven.average_precision == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_a_box_is_found_once_and_by_the_better_one():
    result = evaluate_detections(TWO, {0: detections([0.9, 0, *BOX], [0.8, 0, *BOX]), 1: detections()})[0]
    assert result.precision == 0.5 and result.recall == 0.5 and result.average_precision == 0.5


def test_detections_of_another_image_or_class_are_wrong():
    result = evaluate_detections(TWO, {0: detections([0.9, 0, *FAR], [0.9, 1, *BOX]), 1: detections([0.8, 0, *BOX])})
    assert result[0].recall == 0 and result[1].precision == 0


@pytest.mark.parametrize("iou, right", [(0.5, 1.0), (0.51, 0.0)])
def test_the_iou_counts_from_the_threshold_on(iou, right):
    data = in_memory([[*BOX, 0]])
    assert evaluate_detections(data, {0: detections([0.9, 0, 0, 0, 10, 5])}, iou)[0].recall == right


def test_classes_keep_their_own_numbers():  # the original printed the last class's for all
    data = in_memory([[*BOX, 0], [*FAR, 1]])
    results = evaluate_detections(data, {0: detections([0.9, 0, *BOX], [0.9, 1, *BOX], [0.8, 1, *FAR])})
    assert (results[0].precision, results[1].precision) == (1, 0.5)


def test_classes_without_boxes_or_detections_do_not_crash_and_leave_the_mean_alone():
    data = in_memory([[*BOX, 0], [*FAR, 2]], class_names="abc")
    results = evaluate_detections(data, {0: detections([0.9, 0, *BOX], [0.9, 1, *BOX])})
    assert results[1][:4] == (0, 0, 0, 0) and results[2][:4] == (0, 1, 0, 0)
    assert mean_average_precision(results) == 0.5  # of a and c; b has no boxes
    empty = evaluate_detections(in_memory([]), {0: detections()})
    assert mean_average_precision(empty) == 0
    assert "mAP" in voc.class_table(results, data)


def test_difficult_boxes_neither_count_nor_hurt():
    data = in_memory([[*BOX, 0], [*FAR, 0]], difficult=np.array([False, True]))
    result = evaluate_detections(data, {0: detections([0.9, 0, *FAR], [0.8, 0, *BOX])})[0]
    assert result[:4] == (1, 1, 1, 1)


def test_images_that_were_not_looked_at_do_not_count():
    assert evaluate_detections(TWO, {0: detections([0.9, 0, *BOX])})[0].num_boxes == 1


def test_average_precision_reads_the_best_precision_at_each_recall_or_higher():
    recall, precision = np.array([0.25, 0.5, 0.5, 0.75]), np.array([1, 1, 2 / 3, 0.75])
    assert average_precision(recall, precision, VOC07_RECALLS) == pytest.approx((6 * 1 + 2 * 0.75) / 11)
    assert average_precision(recall, precision) == pytest.approx(0.5 + 0.25 * 0.75)
    assert average_precision(np.zeros(0), np.zeros(0)) == 0


def plain_loop(data, found, label, iou_threshold):
    """The algorithm of Pascal VOC's development kit as a plain loop over detections."""
    rows = [
        (score, index, box)
        for index, one in found.items()
        for score, name, box in zip(*one, strict=True)
        if name == label
    ]
    used, right = set(), []
    for _, index, box in sorted(rows, key=lambda row: -row[0]):
        best, best_iou = None, 0.0
        for number, truth in enumerate(data.load_annotations(index)):
            if truth[4] == label:
                width = max(0.0, min(box[2], truth[2]) - max(box[0], truth[0]))
                height = max(0.0, min(box[3], truth[3]) - max(box[1], truth[1]))
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, truth)]
                iou = float(width * height / (sum(areas) - width * height))
                if iou > best_iou:
                    best, best_iou = (index, number), iou
        right.append(best_iou >= iou_threshold and best not in used)
        if best_iou >= iou_threshold:
            used.add(best)
    return np.array(right)


def test_equals_a_plain_loop_on_random_data():
    rng = np.random.default_rng(0)
    annotations, image_index, found = [], [], {}
    for index in range(20):
        boxes = np.concatenate([rng.uniform(0, 60, (6, 2)), rng.uniform(10, 40, (6, 2))], axis=1)
        boxes[:, 2:] += boxes[:, :2]
        labels = rng.integers(0, 2, 6)
        annotations += [[*box, label] for box, label in zip(boxes, labels, strict=True)]
        image_index += [index] * 6
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 4, (18, 4))
        found[index] = detections(*np.column_stack([rng.random(18), rng.integers(0, 2, 18), near]).tolist())
    data = in_memory(annotations, image_index, num_images=20)
    results = evaluate_detections(data, found)
    for label in range(2):
        right = plain_loop(data, found, label, 0.5)
        assert 10 < right.sum() < len(right) - 10
        recall = np.cumsum(right) / results[label].num_boxes
        np.testing.assert_allclose(results[label].curve[0], recall)


def test_the_best_scores_of_a_checkpoint():
    data = in_memory([[*BOX, 0], [*FAR, 1]], class_names="abc")
    found = {0: detections([0.9, 0, *BOX], [0.5, 1, *FAR], [0.4, 1, *BOX], [0.3, 2, *BOX])}
    scores = voc.best_scores(evaluate_detections(data, found), data)
    assert 0.4 <= scores["all"] < 0.5 and 0.899 < scores["classes"]["a"] < 0.9 and 0.4 <= scores["classes"]["b"] < 0.5
    assert scores["classes"].keys() == {"a", "b"}  # nothing is right of c
    assert voc.best_scores(evaluate_detections(data, {0: detections()}), data) == {}


def test_compute_overlap_by_hand():
    a = np.array([[0, 0, 10, 10], [20, 20, 30, 30]])
    b = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [10, 10, 20, 20]])
    overlap = voc.compute_overlap(a, b)
    assert overlap.dtype == np.float64
    np.testing.assert_allclose(overlap, [[1, 1 / 3, 0], [0, 0, 0]])


class Images(DetectionDataset):
    def load_image(self, index):
        return np.full((64, 64, 3), 100, dtype=np.uint8)


class FindsBox(nn.Module):
    """Stands in for a RetinaNet: finds BOX of class 0 in every image."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def detect(self, images, image_sizes, score_threshold, max_detections):
        return [detections([0.9, 0, *BOX])] * len(images)


def test_the_originals_interface(caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("retinanet"), "propagate", True)
    caplog.set_level(logging.INFO, "retinanet")
    rows = np.array([[*BOX, 0], [*FAR, 1]], dtype=np.float32)
    data = Images(["0", "1"], rows, np.array([0, 1]), ["a", "b"], Resizer(64, 64))
    model = nn.DataParallel(FindsBox()).train()
    results = voc.evaluate(data, model, save_path=tmp_path / "new")
    assert results == {0: (1, 1), 1: (0, 1)}
    assert model.module.training
    assert "mAP 0.5000" in caplog.text
    assert (tmp_path / "new/pr_curves.png").stat().st_size > 1000
