import json

import numpy as np
import pytest
import torch

from retinanet import coco_eval
from retinanet.datasets import DetectionDataset
from retinanet.postprocess import Detections


def dataset(rows, image_index, num_images=3):
    names = [f"{index}.png" for index in range(num_images)]
    return DetectionDataset(names, np.array(rows, dtype=np.float32), np.array(image_index), ["a", "b"])


DATA = dataset([[10, 10, 60, 60, 0], [100, 100, 140, 130, 1], [5, 5, 205, 205, 1], [3, 3, 13, 13, 0]], [0, 0, 2, 2])


def truth_as_detections(data):
    found = {}
    for index in range(len(data)):
        rows = torch.from_numpy(data.load_annotations(index))
        found[index] = Detections(torch.ones(len(rows)), rows[:, 4].long(), rows[:, :4])
    return found


def score(data, found):
    return coco_eval.score(coco_eval.ground_truth(data), coco_eval.coco_results(data, found), data.image_ids)


def test_the_truth_scores_one():
    metrics = score(DATA, truth_as_detections(DATA))
    assert list(metrics) == list(coco_eval.METRICS)
    assert [metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")] == pytest.approx([1] * 7)


def test_nothing_found_scores_zero():
    nothing = Detections(torch.empty(0), torch.empty(0, dtype=torch.int64), torch.empty(0, 4))
    assert score(DATA, dict.fromkeys(range(3), nothing))["AP"] == 0
    assert score(DATA, {})["AP"] == 0


def test_no_ground_truth_scores_minus_one():
    empty = dataset(np.zeros((0, 5)), np.zeros(0, dtype=int))
    assert score(empty, {})["AP"] == -1


def test_images_without_detections_and_without_boxes_count():
    found = truth_as_detections(DATA)
    del found[2]
    assert score(DATA, found)["AP50"] == pytest.approx((0.5 + 0.5) / 2, abs=0.01)
    found = truth_as_detections(DATA)
    # A false positive in the image without boxes, better than the truth: at first precision 1/2, then 2/3.
    found[1] = Detections(torch.tensor([1.5]), torch.tensor([0]), torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    assert score(DATA, found)["AP50"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)


def test_results_are_in_cocos_format():
    results = coco_eval.coco_results(DATA, truth_as_detections(DATA))
    assert results[1] == {"image_id": 0, "category_id": 1, "bbox": [100, 100, 40, 30], "score": 1}
    json.dumps(results)


def test_table_shows_all_twelve():
    metrics = {name: index / 100 for index, name in enumerate(coco_eval.METRICS)}
    table = coco_eval.metrics_table(metrics)
    assert all(f"{name} {value:.3f}" in table for name, value in metrics.items())
