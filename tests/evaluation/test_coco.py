import json

import numpy as np
import pytest
import torch
from helpers import detections, in_memory
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet.boxes import xywh_to_xyxy
from retinanet.data.coco import CocoDataset
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Resizer
from retinanet.errors import UserError
from retinanet.evaluation import coco
from retinanet.postprocess import Detections

BOXES = [[10, 10, 60, 60, 0], [100, 100, 140, 130, 1], [5, 5, 205, 205, 1], [3, 3, 13, 13, 0]]
DATA = in_memory(BOXES, [0, 0, 2, 2], num_images=3)


def perfect(dataset):
    """The ground truth as detections."""
    found = {}
    for index in range(len(dataset)):
        annotations = torch.from_numpy(dataset.load_annotations(index))
        found[index] = Detections(torch.ones(len(annotations)), annotations[:, 4].long(), annotations[:, :4])
    return found


def noisy(dataset):
    """Detections around the boxes, some of the wrong class."""
    rng, found = np.random.default_rng(0), {}
    for index in range(len(dataset)):
        annotations = np.repeat(dataset.load_annotations(index), 4, axis=0)
        boxes = annotations[:, :4] + rng.normal(0, 8, (len(annotations), 4))
        labels = np.where(rng.random(len(annotations)) < 0.8, annotations[:, 4], 0)
        scores = np.sort(rng.random(len(annotations)))[::-1]
        found[index] = detections(*np.column_stack([scores, labels, boxes]).tolist())
    return found


@pytest.fixture
def coco_data(tmp_path):
    """COCO's layout, without images: a crowd, a large box whose mask has a small `area`, an image without boxes."""
    boxes = [[10, 10, 50, 50], [100, 100, 40, 30], [5, 5, 200, 200], [30, 30, 20, 20]]
    annotations = [
        {"id": 7 + i, "image_id": 30 - 10 * (i // 2), "category_id": [3, 9][i % 2], "bbox": box, "iscrowd": int(i == 1)}
        | {"area": 900 if i == 2 else box[2] * box[3]}
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


def metrics(dataset, found):
    return coco.score(dataset, found).metrics


def test_the_ground_truth_scores_one():
    scores = metrics(DATA, perfect(DATA))
    assert list(scores) == list(coco.METRICS)
    assert [scores[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")] == pytest.approx([1] * 7)


def test_nothing_found_scores_zero_and_no_ground_truth_minus_one():
    assert metrics(DATA, dict.fromkeys(range(3), detections()))["AP"] == 0
    assert metrics(in_memory([]), {0: detections()})["AP"] == -1
    assert metrics(in_memory([]), {0: detections([0.9, 0, 0, 0, 9, 9])})["AP"] == -1


def pycocotools_scores(annotation_file, results_file):
    truth = COCO(annotation_file)
    evaluation = COCOeval(truth, truth.loadRes(str(results_file)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats.tolist()


def test_numbers_are_those_of_pycocotools(coco_data, tmp_path):
    on_crowd = {"image_id": 30, "category_id": 9, "bbox": [105, 105, 10, 10], "score": 0.99}
    results = [*coco.coco_results(coco_data, noisy(coco_data)), on_crowd, {**on_crowd, "image_id": 10}]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    scores = coco.score_results(coco_data, coco.read_results(coco_data, path), range(3))
    assert list(scores.metrics.values()) == pycocotools_scores(coco_data.annotation_file, path)
    assert 0 < scores.metrics["AP"] < 1
    assert [(row.name, row.boxes) for row in scores.classes] == [("a", 2), ("b", 1)]  # the crowd is no box
    assert np.mean([row.AP for row in scores.classes]) == pytest.approx(scores.metrics["AP"])


@pytest.mark.parametrize("scores", ["equal", "near", "whole", "huge", "infinite"])
def test_results_of_any_numbers_score_exactly_as_in_pycocotools(coco_data, tmp_path, scores):
    rng, results = np.random.default_rng(0), []
    draw = {
        "equal": lambda: float(rng.integers(3)) / 4,
        "near": lambda: 0.5 + 1e-12 * float(rng.integers(4)),  # equal in float32
        "whole": lambda: int(rng.integers(3)),
        "huge": lambda: 10 ** int(rng.integers(17, 40)) + 1,
        "infinite": lambda: "1e400" if rng.random() < 0.3 else float(rng.random()),
    }[scores]
    for entry in [*coco.coco_results(coco_data, perfect(coco_data)), *coco.coco_results(coco_data, noisy(coco_data))]:
        entry |= {"image_id": float(entry["image_id"]), "category_id": float(entry["category_id"])}
        x, y, width, height = entry["bbox"]
        for _ in range(3):
            shift = float(rng.choice([0, 0.1, width / 3]))  # a third of the width is exactly IoU 0.5
            results.append({**entry, "bbox": [x + shift, y, width, height], "score": draw()})
        results.append({**entry, "bbox": [x, y, "1e400", height], "score": draw()})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results).replace('"1e400"', "1e400"))
    found = coco.read_results(coco_data, path)
    metrics = coco.score_results(coco_data, found, range(3)).metrics
    assert list(metrics.values()) == pycocotools_scores(coco_data.annotation_file, path)
    assert 0 < metrics["AP"] < 1


def test_images_without_detections_and_images_without_boxes_count():
    found = perfect(DATA)
    found[2] = detections()
    assert metrics(DATA, found)["AP50"] == pytest.approx((0.5 + 0.5) / 2, abs=0.01)
    found = perfect(DATA)
    # A false positive in the image without boxes, better than the others: at first precision 1/2, then 2/3.
    found[1] = detections([1.5, 0, 0, 0, 50, 50])
    assert metrics(DATA, found)["AP50"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)


def test_only_the_images_that_were_looked_at_count():
    found = perfect(DATA)
    scores = coco.score(DATA, {0: found[0]})
    assert scores.metrics["AP"] == pytest.approx(1) and [row.boxes for row in scores.classes] == [1, 1]


def test_the_hundred_best_detections_count():
    dataset = in_memory([[10, 10, 60, 60, 0]])
    for better, expected in ((99, 0.01), (100, 0.0)):
        boxes = torch.tensor([[200.0, 200.0, 250.0, 250.0]] * better + [[10.0, 10.0, 60.0, 60.0]])
        found = Detections(torch.linspace(1, 0.5, len(boxes)), torch.zeros(len(boxes), dtype=torch.int64), boxes)
        assert metrics(dataset, {0: found})["AP"] == pytest.approx(expected)


@pytest.mark.parametrize("limit", [1, 7, 10, 50, 100, 101, 500])
def test_the_limit_is_the_last_of_pycocotools(limit):
    """pycocotools' own `summarize` reads AP at 100 detections only, so that it is read from its arrays here."""
    rng = np.random.default_rng(0)
    boxes = np.concatenate([np.arange(120)[:, None] * [20, 0] + [0, 5], np.full((120, 2), 14)], axis=1)
    dataset = in_memory(np.column_stack([xywh_to_xyxy(torch.tensor(boxes)), np.arange(120) % 8 == 0]))
    found = [
        {"image_id": 0, "category_id": int(label), "bbox": box, "score": float(rng.random())}
        for label, box in zip(rng.random(120) < 0.15, (boxes + rng.normal(0, 1.5, boxes.shape)).tolist(), strict=True)
    ]
    scores = coco.score_results(dataset, found, [0], limit).metrics
    plain = COCOeval(dataset.coco, dataset.coco.loadRes([dict(one) for one in found]), "bbox")
    plain.params.maxDets = sorted([min(1, limit), min(10, limit), limit])
    plain.evaluate()
    plain.accumulate()
    precision, recall = (np.ma.masked_less(plain.eval[name], 0) for name in ("precision", "recall"))
    expected = {"AP": precision[:, :, :, 0, 2].mean(), "AP50": precision[0, :, :, 0, 2].mean()}
    expected |= {f"AR{number}": recall[:, :, 0, place].mean() for place, number in enumerate(plain.params.maxDets)}
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert list(scores) == list(dict.fromkeys(coco.metric_names(limit)))
    assert 0 < scores["AP"] < 1 and f"AR{limit} " in coco.metrics_table(scores)
    if limit == 100:
        plain.summarize()
        assert list(scores.values()) == plain.stats.tolist() and tuple(scores) == coco.METRICS


def test_difficult_boxes_are_ignored():
    dataset = in_memory([[10, 10, 60, 60, 0], [100, 100, 160, 160, 0]], difficult=np.array([False, True]))
    assert metrics(dataset, {0: detections([0.9, 0, 100, 100, 160, 160], [0.8, 0, 10, 10, 60, 60])})[
        "AP"
    ] == pytest.approx(1)


def test_curves_and_tables(coco_data):
    scores = coco.score(coco_data, perfect(coco_data))
    curves = scores.curves(5)
    assert curves["a"].shape == (2, 101) and curves["a"][1].mean() == 1
    assert coco.score(DATA, {1: detections()}).curves(0)["a"].shape == (2, 0)
    assert coco.class_table(scores.classes).splitlines()[1].split() == ["a", "1.000", "1.000", "1.000", "2"]
    numbers = {name: index / 100 for index, name in enumerate(coco.METRICS)}
    table = coco.metrics_table(numbers)
    assert all(f"{name} {value:.3f}" in table for name, value in numbers.items())


def test_results_are_in_cocos_format():
    results = coco.coco_results(DATA, perfect(DATA))
    assert results[1] == {"image_id": 0, "category_id": 1, "bbox": [100, 100, 40, 30], "score": 1}


def test_reading_results_is_the_inverse_of_writing_them(coco_data, tmp_path):
    found, path = noisy(coco_data), tmp_path / "results.json"
    path.write_text(json.dumps(coco.coco_results(coco_data, found)))
    again = coco.to_detections(coco_data, coco.read_results(coco_data, path))
    assert sorted(again) == [0, 1, 2]
    for index in range(3):
        assert again[index].boxes.dtype == again[index].scores.dtype == torch.float64
        for ours, expected in zip(again[index], found[index], strict=True):
            torch.testing.assert_close(ours, expected, check_dtype=False)


GOOD = {"image_id": 10, "category_id": 3, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([GOOD, {**GOOD, "image_id": 11}], "entry 1: image_id 11 does not exist"),
        ([{**GOOD, "image_id": [10]}], r"entry 0: image_id \[10\] does not exist"),
        ([{**GOOD, "category_id": 1}], "category_id 1 does not exist"),
        ([{**GOOD, "bbox": [0, 0, 5]}], "bbox must be 4 numbers"),
        ([{**GOOD, "bbox": [0, 0, 5, "5"]}], "bbox must be 4 numbers"),
        ([{**GOOD, "bbox": [0, 0, 5, float("nan")]}], "bbox must be 4 numbers"),
        ([{**GOOD, "bbox": [0, 0, 5, 10**400]}], "bbox must be 4 numbers"),
        ([{**GOOD, "image_id": 10.5}], "image_id 10.5 does not exist"),
        ([{**GOOD, "image_id": True}], "image_id True does not exist"),
        ([{**GOOD, "score": -(10**400)}], "score must be a number"),
        ([{**GOOD, "score": float("nan")}], "score must be a number"),
        ([{**GOOD, "score": None}], "score must be a number"),
        ([{**GOOD, "score": True}], "score must be a number"),
        ([GOOD, 5], "entry 1: is not a detection"),
        ({"annotations": [GOOD]}, "is not a list"),
    ],
)
def test_wrong_results_files_are_named(coco_data, tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        coco.read_results(coco_data, path)
    assert str(path) in str(caught.value)


def test_missing_results_files_are_named(coco_data, tmp_path):
    with pytest.raises(UserError, match=r"nothing\.json: cannot be read"):
        coco.read_results(coco_data, tmp_path / "nothing.json")


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_coco_keeps_the_mode(filled_net, training):
    net = filled_net.train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    try:
        assert list(coco.evaluate_coco(ShapesDataset(2, transform=Resizer(64, 64)), net, threshold=0.2)) == [
            *coco.METRICS
        ]
        assert net.training == training and net.bn1.training == training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    finally:
        filled_net.eval()
