import logging

import numpy as np
import pytest
import torch
from helpers import gradient
from PIL import Image

from retinanet.anchors import Anchors
from retinanet.data.loader import collater, make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Augmenter, Resizer, normalize
from retinanet.matcher import IGNORE, match_anchors
from retinanet.postprocess import Detections
from retinanet.visual import views
from retinanet.visual.drawing import class_colour

NAMES = ["circle", "rectangle", "triangle"]


def detections(rows):
    """(score, label, x1, y1, x2, y2) each."""
    rows = torch.tensor(rows).reshape(-1, 6)
    return Detections(rows[:, 0], rows[:, 1].long(), rows[:, 2:])


def test_a_detection_is_right_if_it_is_the_best_one_on_a_free_box_of_its_class():
    truth = np.array([[0, 0, 10, 10, 0], [20, 20, 30, 30, 1], [50, 50, 60, 60, 0]], dtype=np.float32)
    found = detections(
        [
            (0.9, 0, 0, 0, 10, 9),  # right
            (0.8, 0, 0, 0, 10, 10),  # the box is taken
            (0.7, 0, 20, 20, 30, 30),  # the wrong class
            (0.6, 1, 20, 20, 30, 25.5),  # right, at IoU 0.55
            (0.5, 0, 50, 50, 60, 54),  # IoU 0.4
        ]
    )
    right, hit = views.judge(found, truth)
    assert right.tolist() == [True, False, False, True, False]
    assert hit.tolist() == [True, True, False]
    assert views.judge(found, truth, 0.3)[0].tolist() == [True, False, False, True, True]
    assert [len(part) for part in views.judge(found, truth[:0])] == [5, 0]
    assert [len(part) for part in views.judge(detections([]), truth)] == [0, 3]


def test_right_false_and_missed_differ_in_line_style(monkeypatch):
    drawn = []
    plain = views.draw_boxes
    monkeypatch.setattr(views, "draw_boxes", lambda *args, **kw: drawn.append(args) or plain(*args, **kw))
    truth = np.array([[10, 10, 100, 100, 0], [200, 200, 300, 300, 1]], dtype=np.float32)
    found = detections([(0.9, 0, 10, 10, 100, 99), (0.8, 2, 150, 20, 220, 90)])
    picture = views.draw_detections(gradient(330, 340), truth, found, NAMES)
    (_, boxes, labels, captions, styles), right_panel = drawn
    assert (boxes.tolist(), list(labels), captions) == (truth[:, :4].tolist(), [0, 1], ["circle", "rectangle"])
    assert styles == ["solid", "dotted"]
    assert right_panel[1].tolist() == [[10, 10, 100, 99], [150, 20, 220, 90], [200, 200, 300, 300]]
    assert right_panel[3] == ["circle 0.90", "triangle 0.80", "missed rectangle"]
    assert right_panel[4] == ["solid", "dashed", "dotted"]
    assert picture.shape[1] > 680
    # The pixels: the truth's box at its place in the left half.
    bar = picture.shape[0] - 330
    assert tuple(picture[bar + 99, 50]) == class_colour(0)


@pytest.mark.parametrize("best_match_iou", [None, 0.4])
def test_as_many_anchors_are_drawn_as_the_matcher_assigns(monkeypatch, best_match_iou):
    drawn = []
    plain = views._outline
    monkeypatch.setattr(views, "_outline", lambda *args: drawn.append(args) or plain(*args))
    titles = []
    monkeypatch.setattr(views, "side_by_side", lambda _, texts: titles.extend(texts))
    truth = np.array([[10, 10, 80, 90, 0], [100, 100, 220, 160, 1], [150, 20, 171, 41, 2]], dtype=np.float32)
    anchors = Anchors()(torch.empty(1, 3, 256, 256))[0]
    matches = match_anchors(anchors, torch.from_numpy(truth)[None], best_match_iou)[0]
    views.draw_matches(gradient(256, 256), truth, anchors, NAMES, best_match_iou)
    (_, positive, colours, _), (_, ignored, _, _) = drawn
    assert torch.equal(positive, anchors[matches >= 0]) and torch.equal(ignored, anchors[matches == IGNORE])
    for row in range(3):
        reached = (matches == row).any()
        assert colours.count(class_colour(row)) == (matches == row).sum()
        assert reached or row == 2
    assert titles[0].startswith(f"{(matches >= 0).sum()} positive anchors, for {2 + (best_match_iou is not None)} of 3")
    assert titles[1].startswith(f"{(matches == IGNORE).sum()} ignored")


def test_a_box_that_no_anchor_reaches_is_red(monkeypatch):
    seen = []
    plain = views.draw_boxes
    monkeypatch.setattr(views, "draw_boxes", lambda *args, **kw: seen.append(args[3]) or plain(*args, **kw))
    truth = np.array([[300, 300, 312, 312, 1]], dtype=np.float32)
    picture = views.draw_matches(
        np.full((608, 608, 3), 128, np.uint8), truth, Anchors()(torch.empty(1, 3, 608, 608))[0], NAMES
    )
    bar = picture.shape[0] - 608
    assert tuple(picture[bar + 300, 300]) == views.RED
    assert seen[0] == ["rectangle: 0, best IoU 0.14"]  # 144 / 1024
    assert views.RED not in {class_colour(label) for label in range(100)}


def test_matches_and_anchors_of_a_picture_without_boxes():
    anchors = Anchors()
    picture = views.draw_matches(
        gradient(64, 64), np.zeros((0, 5), np.float32), anchors(torch.empty(1, 3, 64, 64))[0], NAMES
    )
    assert picture.dtype == np.uint8
    assert views.draw_anchors(gradient(64, 64), np.zeros((0, 5), np.float32), anchors).dtype == np.uint8


def test_the_nine_anchors_of_the_location_that_fits_best_are_drawn_for_each_level(monkeypatch):
    drawn = []
    plain = views.draw_boxes
    monkeypatch.setattr(views, "draw_boxes", lambda *args, **kw: drawn.append(args) or plain(*args, **kw))
    # The square anchor of scale 1 of P4's location (row 7, column 5), whose middle is (88, 120).
    truth = np.array([[56, 88, 120, 152, 0]], dtype=np.float32)
    views.draw_anchors(gradient(256, 320), truth, Anchors())
    assert [len(args[1]) for args in drawn] == [10] * 5
    assert all(args[4] == ["dotted", *["solid"] * 9] for args in drawn)
    boxes = np.asarray(drawn[1][1])  # of P4: the truth, then the anchors
    np.testing.assert_allclose(boxes[1:].reshape(3, 3, 4)[1, 0], boxes[0], atol=1e-3)
    scale = drawn[1][0].shape[1] / (320 + 2 * views.FRAME)
    np.testing.assert_allclose(boxes[0], (truth[0, :4] + views.FRAME) * scale, rtol=1e-3)
    for image, boxes, *_ in drawn:  # nothing is cut off
        height, width = image.shape[:2]
        assert np.min(boxes) >= -1 and (np.max(boxes, axis=0) <= (width + 1, height + 1, width + 1, height + 1)).all()


def test_a_batch_is_shown_as_the_network_gets_it():
    samples = [Resizer(64, 96)({"img": gradient(48, 64), "annot": np.array([[4, 8, 24, 40, 1]])})]
    samples += [Resizer(64, 96)({"img": gradient(40, 60), "annot": np.zeros((0, 5))})]
    batch = collater(samples)
    sheet = views.draw_batch(batch, NAMES)
    again = views.draw_batch({**batch, "img": normalize(batch["img"])}, NAMES)
    assert np.abs(sheet.astype(int) - again).max() <= 1
    # 64 x 96, enlarged 5 times, after a gap; the box in its colour.
    gap = max(4, 480 // 60)
    assert tuple(sheet[gap + round(5 * 8 * 64 / 48), gap + 5 * 20]) == class_colour(1)


def test_the_first_batch_is_the_loaders_first_batch(tmp_path, monkeypatch):
    resizer = Resizer(64, 96)
    dataset = ShapesDataset(8, transform=lambda sample: resizer(Augmenter()(sample)))
    sampler = AspectRatioBasedSampler(dataset, 4, seed=3)
    expected = next(iter(make_loader(dataset, 4, 0, AspectRatioBasedSampler(dataset, 4, seed=3))))
    batches = []
    plain = views.draw_batch
    monkeypatch.setattr(views, "draw_batch", lambda batch, names: batches.append(batch) or plain(batch, names))
    views.save_data_images(dataset, sampler, tmp_path)
    assert torch.equal(batches[0]["img"], expected["img"]) and torch.equal(batches[0]["annot"], expected["annot"])
    assert (sampler.epoch, sampler.first_step) == (0, 0)
    assert {path.name for path in tmp_path.iterdir()} == {"batch.png", "labels.png"}


def test_without_matplotlib_there_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    dataset = ShapesDataset(2, transform=Resizer(64, 96))
    with caplog.at_level(logging.INFO, "retinanet"):
        views.save_data_images(dataset, AspectRatioBasedSampler(dataset, 2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]
    assert "no labels.png" in caplog.text and "pip install matplotlib" in caplog.text


def test_the_label_chart_has_bars_in_the_classes_colours(tmp_path):
    pytest.importorskip("matplotlib")
    dataset = ShapesDataset(6)
    views.draw_label_chart(dataset, tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    counts = np.bincount(dataset.annotations[:, 4].astype(int), minlength=3)
    areas = np.array([(pixels == class_colour(label)).all(axis=2).sum() for label in range(3)])
    np.testing.assert_allclose(areas / areas.sum(), counts / counts.sum(), atol=0.05)


def test_the_sheet_of_a_validation(tmp_path):
    dataset = ShapesDataset(3)
    found = {index: detections([(0.9, 0, 10, 10, 50, 50), (0.2, 1, 0, 0, 20, 20)]) for index in range(3)}
    views.save_detections(dataset, found, tmp_path / "sheet.png", limit=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 2 * 2 * 320 and sheet.size[1] < 2 * 420  # two pairs in one row
    views.save_detections(dataset, {}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
