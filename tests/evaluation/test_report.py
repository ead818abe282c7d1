import json

import numpy as np
from helpers import detections, in_memory

from retinanet.evaluation import coco, report

BOX, FAR = [0, 0, 10, 10], [50, 50, 60, 60]
DATA = in_memory([[*BOX, 0], [*FAR, 1]])
FOUND = {0: detections([0.9, 0, *BOX], [0.8, 0, *FAR])}


def test_an_evaluation_as_text():
    text = report.evaluate(DATA, FOUND, iou_threshold=0.4).text()
    for part in ("1 image, 2 detections\nAP ", *(f"{name} " for name in coco.METRICS), "IoU 0.4", "mAP 0.5000"):
        assert part in text
    assert "missed" not in text and "1 x  b found as a" in report.evaluate(DATA, FOUND, analyse=True).text()


def test_an_evaluation_as_files(tmp_path):
    evaluation = report.evaluate(DATA, FOUND, analyse=True)
    evaluation.write(tmp_path)
    assert json.loads((tmp_path / "detections.json").read_text()) == coco.coco_results(DATA, FOUND)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == evaluation.metrics() and set(coco.METRICS) <= set(metrics) and metrics["mAP"] == 0.5
    names = ["name", "AP", "AP50", "AR", "boxes", "VOC_AP", "precision", "recall"]
    assert [list(row) for row in metrics["classes"]] == [names, names]
    assert metrics["errors"]["counts"]["class"] == 1 and metrics["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert "errors" not in report.evaluate(DATA, FOUND).metrics()


def test_boxes_beyond_cocos_limit_are_counted():
    corners = np.arange(103)[:, None] * [10, 0, 10, 0] + [0, 0, 8, 8]
    boxes = np.column_stack([corners, [0] * 102 + [1]])
    for index, note in ((0, "COCO takes 100 detections of a class in an image: 2 boxes must count as missed"), (1, "")):
        dataset = in_memory(boxes, [index] * 103, num_images=2)
        text = report.evaluate(dataset, {0: detections()}).text()
        assert note in text and ("COCO takes" in text) == bool(note)
