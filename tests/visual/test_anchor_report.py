import json
import logging

import numpy as np
import pytest
import torch
from boxes_data import make_dataset, plates
from PIL import Image

from retinanet.anchors import Anchors
from retinanet.visual import anchor_fit, anchor_report


def test_training_is_warned_of_boxes_out_of_reach(caplog):
    big, tiny = [[100, 100, 164, 164]] * 19, [[10, 10, 14, 14]] * 2
    with caplog.at_level(logging.INFO, "retinanet"):
        anchor_report.log_summary(make_dataset(big + tiny[:1]), Anchors(), 480, 1024)  # 5 %: not more
        assert len(caplog.records) == 1 and "95.0 % of the boxes" in caplog.text
        caplog.clear()
        anchor_report.log_summary(make_dataset(big + tiny), Anchors(), 480, 1024)
    assert "warning: 2 of 21 boxes (9.5 %)" in caplog.text and "larger --min_side, or run `visualize.py" in caplog.text
    caplog.clear()
    anchor_report.log_summary(
        make_dataset(big + tiny), Anchors(), None, None
    )  # tiles, which --min_side does not resize
    assert "by IoU 0.5: run `visualize.py --show anchor_fit`" in caplog.text


def test_a_data_set_without_boxes_has_a_summary():
    assert "no boxes" in anchor_report.summary(anchor_fit.measure(make_dataset([]), Anchors(), 480, 1024))


def test_the_advised_flags_give_the_advised_anchors():
    words = anchor_report.flags(plates()[1].anchors).split()
    assert [words[0], words[4]] == ["--anchor_scales", "--anchor_ratios"]
    again = Anchors(scales=list(map(float, words[1:4])), ratios=list(map(float, words[5:])))
    assert torch.equal(again.cells, plates()[1].anchors.cells)


def test_the_report_names_boxes_out_of_reach_and_the_advice():
    fit, better, dataset = plates()
    text = anchor_report.report(fit, better, dataset, limit=5)
    assert f"{fit.unreachable.sum()} boxes can never be learned" in text
    assert text.count(" px after resizing, in ") == 5 and f"and {fit.unreachable.sum() - 5} more" in text
    assert f"use {anchor_report.flags(better.anchors)}" in text
    content = json.loads(json.dumps(anchor_report.as_dict(fit, better, dataset)))
    assert len(content["unreachable"]) == fit.unreachable.sum()
    first = np.flatnonzero(fit.unreachable)[0]
    assert content["unreachable"][0]["file"] == f"{fit.boxes.image_index[first]}.jpg"
    assert content["unreachable"][0]["box"] == pytest.approx(dataset.annotations[first, :4].tolist(), abs=0.02)
    assert Anchors(**{k: v for k, v in content["advised"].items() if k != "flags"}).ratios == better.anchors.ratios
    assert "keep these anchors" in anchor_report.report(fit, fit, dataset)


def test_the_chart_shows_boxes_out_of_reach_in_red(tmp_path):
    pytest.importorskip("matplotlib")
    anchor_report.draw(*plates()[:2], tmp_path / "fit.png")
    with Image.open(tmp_path / "fit.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 600
    lower_right = pixels[pixels.shape[0] // 2 :, pixels.shape[1] // 2 :]
    assert ((lower_right[..., 0] - lower_right[..., 1:].max(axis=2)) > 60).sum() > 50


def test_of_many_classes_those_with_the_most_boxes_out_of_reach_are_listed(tmp_path):
    pytest.importorskip("matplotlib")
    names = [f"class\n{label:02d}" for label in range(40)]
    boxes = [[10, 10, 14, 14] if label % 2 else [100, 100, 164, 164] for label in range(40)]
    fit = anchor_fit.measure(make_dataset(boxes, range(40), names=names), Anchors(), 480, 1024)
    text = anchor_report.report(fit, fit, make_dataset(boxes, range(40), names=names))
    assert r"class\n39 " in text and r"class\n38 " not in text and "... and the rest in anchor_fit.json" in text
    anchor_report.draw(fit, fit, tmp_path / "fit.png")
    assert (tmp_path / "fit.png").exists()
