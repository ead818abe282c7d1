import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet.data.coco import CocoDataset
from retinanet.data.dataset import DetectionDataset
from retinanet.errors import UserError
from retinanet.evaluation import coco as coco_eval
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
    return coco_eval.score(coco_eval.ground_truth(data), coco_eval.coco_results(data, found), data.image_ids).metrics


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


def noisy(data, seed=0):
    """Detections around the boxes, some of the wrong class."""
    rng = np.random.default_rng(seed)
    found = {}
    for index in range(len(data)):
        rows = np.repeat(data.load_annotations(index), 4, axis=0)
        boxes = rows[:, :4] + rng.normal(0, 8, (len(rows), 4))
        labels = np.where(rng.random(len(rows)) < 0.8, rows[:, 4], 0)
        scores = np.sort(rng.random(len(rows)))[::-1]
        tensors = (
            torch.tensor(np.ascontiguousarray(values), dtype=torch.float32) for values in (scores, labels, boxes)
        )
        scores, labels, boxes = tensors
        found[index] = Detections(scores, labels.long(), boxes)
    return found


def coco_folder(tmp_path):
    """COCO's layout, without pictures: a crowd, a small box whose `area` says large, an image without boxes."""
    boxes = [[10, 10, 50, 50], [100, 100, 40, 30], [5, 5, 200, 200], [30, 30, 20, 20]]
    annotations = [
        {"id": 7 + i, "image_id": 30 - 10 * (i // 2), "category_id": [3, 9][i % 2], "bbox": box, "iscrowd": int(i == 1)}
        | {"area": 20000 if i == 3 else box[2] * box[3]}
        for i, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": id, "file_name": f"{id}.jpg", "width": 300, "height": 300} for id in (30, 20, 10)],
        "categories": [{"id": 9, "name": "b"}, {"id": 3, "name": "a"}],
        "annotations": annotations,
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return CocoDataset(tmp_path, "val")


def pycocotools_alone(path, results):
    truth = COCO(path)
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def test_numbers_are_pycocotools_own(tmp_path):
    data = coco_folder(tmp_path)
    results = coco_eval.coco_results(data, noisy(data))
    on_crowd = {"image_id": 30, "category_id": 9, "bbox": [105, 105, 10, 10], "score": 0.99}
    results += [on_crowd, {**on_crowd, "image_id": 10}]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    scores = coco_eval.score(coco_eval.ground_truth(data), coco_eval.read_results(path, data.coco), data.image_ids)
    expected = pycocotools_alone(data.annotation_file, results)
    assert list(scores.metrics.values()) == pytest.approx(expected, abs=1e-12)
    assert 0 < scores.metrics["AP"] < 1
    assert [(row.name, row.boxes) for row in scores.classes] == [("a", 2), ("b", 1)]  # the crowd is no box
    assert np.mean([row.AP for row in scores.classes]) == pytest.approx(scores.metrics["AP"])


def test_results_and_detections_are_the_same_thing(tmp_path):
    data = coco_folder(tmp_path)
    found = noisy(data)
    again = coco_eval.detections_of(data, coco_eval.coco_results(data, found))
    assert sorted(again) == [0, 1, 2]
    for index in range(3):
        for ours, expected in zip(again[index], found[index], strict=True):
            torch.testing.assert_close(ours, expected)


GOOD = {"image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    "content, message",
    [
        ([GOOD, {**GOOD, "image_id": 11}], "entry 1: there is no image 11"),
        ([{**GOOD, "image_id": [10]}], "entry 0: there is no image"),
        ([{**GOOD, "category_id": 1}], "there is no category 1"),
        ([{**GOOD, "bbox": [0, 0, 5]}], "bbox must be 4 numbers"),
        ([{**GOOD, "bbox": [0, 0, 5, "5"]}], "bbox must be 4 numbers"),
        ([{**GOOD, "bbox": [0, 0, 5, float("nan")]}], "bbox must be 4 numbers"),
        ([{**GOOD, "score": None}], "score must be a number"),
        ([{**GOOD, "score": True}], "score must be a number"),
        ([GOOD, 5], "entry 1: is no detection"),
        ({"annotations": [GOOD]}, "not a list"),
    ],
)
def test_wrong_results_files_are_named(tmp_path, content, message):
    data = coco_folder(tmp_path)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        coco_eval.read_results(path, data.coco)
    assert str(path) in str(caught.value)


def test_missing_and_broken_results_files_are_named(tmp_path):
    data = coco_folder(tmp_path)
    with pytest.raises(UserError, match=r"nothing\.json: cannot be read"):
        coco_eval.read_results(tmp_path / "nothing.json", data.coco)
    (tmp_path / "broken.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not valid JSON"):
        coco_eval.read_results(tmp_path / "broken.json", data.coco)


def test_curves_and_tables(tmp_path):
    data = coco_folder(tmp_path)
    scores = coco_eval.score(data.coco, coco_eval.coco_results(data, truth_as_detections(data)), data.image_ids)
    curves = coco_eval.recall_precision(scores, 5)
    assert curves["a"].shape == (2, 101) and curves["a"][1].mean() == 1
    table = coco_eval.class_table(scores.classes)
    assert table.splitlines()[1].split() == ["a", "1.000", "1.000", "1.000", "2"]


def test_the_hundred_best_detections_count():
    data = dataset([[10, 10, 60, 60, 0]], [0], 1)
    for better, expected in ((99, 0.01), (100, 0.0)):
        boxes = torch.tensor([[200.0, 200.0, 250.0, 250.0]] * better + [[10.0, 10.0, 60.0, 60.0]])
        found = Detections(torch.linspace(1, 0.5, len(boxes)), torch.zeros(len(boxes), dtype=torch.int64), boxes)
        assert score(data, {0: found})["AP"] == pytest.approx(expected)


def test_difficult_boxes_are_ignored():
    rows = np.array([[10, 10, 60, 60, 0], [100, 100, 160, 160, 0]], dtype=np.float32)
    data = DetectionDataset(["0.png"], rows, np.array([0, 0]), ["a"], difficult=np.array([False, True]))
    found = Detections(torch.tensor([0.9, 0.8]), torch.tensor([0, 0]), torch.from_numpy(rows[[1, 0], :4].copy()))
    assert score(data, {0: found})["AP"] == pytest.approx(1)
