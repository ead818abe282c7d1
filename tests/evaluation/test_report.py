import json

import numpy as np
import pytest
from helpers import detections, in_memory

from retinanet.evaluation import coco, report

BOX, FAR = [0, 0, 10, 10], [50, 50, 60, 60]
DATA = in_memory([[*BOX, 0], [*FAR, 1]])
FOUND = {0: detections([0.9, 0, *BOX], [0.8, 0, *FAR])}


def test_an_evaluation_as_text():
    text = report.Evaluation(DATA, FOUND, iou_threshold=0.4).text()
    for part in ("1 image, 2 detections\nAP ", *(f"{name} " for name in coco.METRICS), "IoU 0.4", "mAP 0.5000"):
        assert part in text
    assert "missed" not in text and "1 x  b found as a" in report.Evaluation(DATA, FOUND, analyse=True).text()


def test_tables_stay_narrow_where_names_are_long():
    data = in_memory([[*BOX, 0], [*FAR, 1]])
    data.labels = {0: "a" * 900, 1: "b"}
    data.classes = {name: label for label, name in data.labels.items()}
    text = report.Evaluation(data, FOUND, analyse=True, min_precision=0.5).text()
    assert "a" * 39 + "\N{HORIZONTAL ELLIPSIS}" in text and max(map(len, text.split("\n"))) < 140


def test_an_evaluation_as_files(tmp_path):
    evaluation = report.Evaluation(DATA, FOUND, analyse=True)
    evaluation.write(tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == coco.coco_results(DATA, FOUND)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == evaluation.metrics() and set(coco.METRICS) <= set(metrics) and metrics["mAP"] == 0.5
    names = ["name", "AP", "AP50", "AR", "boxes", "VOC_AP", "precision", "recall", "best_f1", "above"]
    assert [list(row) for row in metrics["classes"]] == [names, names]
    assert metrics["errors"]["counts"]["class"] == 1 and metrics["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert "errors" not in report.Evaluation(DATA, FOUND).metrics()


def test_operating_points_as_text_and_as_numbers(tmp_path):
    # a: one right and one wrong detection; b: none.
    evaluation = report.Evaluation(DATA, FOUND, min_precision=0.95)
    for line in (
        "a       1.000    1.000       0.85      1.000   1.000       1",
        "b       0.000        -          -          -       -       1",
        "all     0.500    0.667       0.85      1.000   0.500       2",
        "number of objects an image, at the best F1 of all: mean error -1.00, mean absolute error 1.00",
        "lowest score with a precision of 0.95:",
        "b              -          -       -       1",
    ):
        assert line in evaluation.text().split("\n")
    metrics = evaluation.metrics()
    point = {"score": 0.85, "f1": 2 / 3, "precision": 1, "recall": 0.5, "right": 1, "false": 0, "missed": 1}
    point |= {"count_error": -1, "absolute_count_error": 1}
    assert metrics["best_f1"] == metrics["min_precision"] == point
    assert metrics["classes"][0]["best_f1"]["missed"] == 0 and metrics["classes"][1]["min_precision"] is None
    above = {name: column[17] for name, column in metrics["above"].items()}
    assert above == {"score": 0.85, "precision": 1, "recall": 0.5, "f1": 2 / 3}
    assert metrics["above"]["precision"][18:] == [None, None] and json.dumps(metrics, allow_nan=False)
    for name, one in {"some": evaluation, "none": report.Evaluation(DATA, {0: detections()})}.items():
        one.draw_thresholds(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "min_precision" not in report.Evaluation(DATA, FOUND).metrics()


def grid(number, label=0):
    """Boxes beside each other, [number, 5]."""
    corners = np.arange(number)[:, None] * [10, 0, 10, 0] + [0, 0, 8, 8]
    return np.column_stack([corners, np.full(number, label)])


def test_boxes_beyond_the_limit_are_a_warning_with_what_is_possible():
    dataset = in_memory(np.concatenate([grid(102), grid(1, 1)]), num_images=2)
    note = report.limits_note(dataset, [0, 1], 100)
    # The box of class b is found, and 99 of class a: AP (1 + 0.97) / 2 at COCO's 101 recalls.
    assert note.startswith("warning: 1 image with more boxes than the 100 detections that count (--max_detections): ")
    ap = (1 + 98 / 101) / 2
    assert note.endswith(f"at best 100 of 103 boxes can be found, which is AP {ap:.3f}")
    by_class = report.limits_note(dataset, [0, 1], 100, by_class=True)
    assert "100 detections of a class that count" in by_class and "at best 101 of 103 boxes" in by_class
    assert [report.limits_note(dataset, *args) for args in (([0, 1], 103), ([1], 100), ([0], 102, True))] == [""] * 3
    assert note in report.Evaluation(dataset, {0: detections(), 1: detections()}).text()
    assert by_class in report.Evaluation(dataset, {0: detections(), 1: detections()}, results=[]).text()


@pytest.mark.parametrize(("count", "found"), [(200, 51 / 101), pytest.param(500, 21 / 101, marks=pytest.mark.slow)])
def test_the_ground_truth_scores_one_at_hundreds_of_boxes_an_image(count, found):
    dataset = in_memory(grid(count))
    truth = {0: detections(*([0.9, 0, *row[:4]] for row in grid(count).tolist()))}
    evaluation = report.Evaluation(dataset, truth, limit=count, analyse=True)
    assert evaluation.coco.metrics["AP"] == evaluation.coco.metrics[f"AR{count}"] == evaluation.errors.ap50 == 1
    assert "warning" not in evaluation.text() and not any(evaluation.errors.counts.values())
    evaluation = report.Evaluation(dataset, truth, analyse=True)
    assert evaluation.coco.metrics["AP"] == evaluation.errors.ap50 == pytest.approx(found)  # recall up to 100 of them
    assert f"at best 100 of {count} boxes can be found, which is AP {found:.3f}" in evaluation.text()
