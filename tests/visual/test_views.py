import numpy as np
import pytest
import torch
from helpers import gradient
from PIL import Image

from retinanet.data.shapes import ShapesDataset
from retinanet.postprocess import Detections
from retinanet.visual import views
from retinanet.visual.drawing import CELL_SIDE, class_colour, draw_boxes

NAMES = ["circle", "rectangle", "triangle"]


def detections(rows):
    """(score, label, x1, y1, x2, y2) each."""
    rows = torch.tensor(rows).reshape(-1, 6)
    return Detections(rows[:, 0], rows[:, 1].long(), rows[:, 2:])


def test_right_false_and_missed_differ_in_line_style():
    image = gradient(330, 340)
    annotations = np.array([[10, 30, 100, 120, 0], [200, 200, 300, 300, 1]], dtype=np.float32)
    found = detections([(0.9, 0, 10, 30, 100, 119), (0.8, 2, 150, 40, 220, 110)])
    right, hit = np.array([True, False]), np.array([True, False])
    picture = views.draw_detections(image, annotations, found, right, hit, NAMES)
    bar = picture.shape[0] - 330
    truth = draw_boxes(image, annotations[:, :4], [0, 1], ["circle", "rectangle"], ["solid", "dotted"])
    np.testing.assert_array_equal(picture[bar:, :340], truth)
    boxes = [*found.boxes.tolist(), annotations[1, :4]]
    captions = ["circle 0.90", "triangle 0.80", "missed rectangle"]
    expected = draw_boxes(image, boxes, [0, 2, 1], captions, ["solid", "dashed", "dotted"])
    start = (picture.shape[1] + 3) // 2
    np.testing.assert_array_equal(picture[bar:, start : start + 340], expected)


@pytest.mark.parametrize("nothing", ["detections", "annotations", "both"])
def test_images_without_detections_or_annotations(nothing):
    rows = [] if nothing in ("detections", "both") else [(0.9, 0, 10.0, 30.0, 100.0, 119.0)]
    annotations = np.zeros((int(nothing == "detections"), 5), dtype=np.float32)
    right, hit = np.zeros(len(rows), dtype=bool), np.zeros(len(annotations), dtype=bool)
    picture = views.draw_detections(gradient(330, 340), annotations, detections(rows), right, hit, NAMES)
    assert picture.shape[1] > 680


class Images(ShapesDataset):
    """The first image is long and thin."""

    def load_image(self, index):
        return gradient(40, 1200) if index == 0 else super().load_image(index)


def test_a_sheet_has_one_scale(tmp_path):
    dataset = Images(3)
    one = detections([(0.9, 0, 10, 10, 50, 50)])
    judged = {i: (one, np.array([True]), np.zeros(len(dataset.load_annotations(i)), bool)) for i in range(3)}
    views.save_detections(dataset, judged, tmp_path / "sheet.png", limit=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        width, height = sheet.size
        pixels = np.asarray(sheet.convert("RGB"))
    assert 4 * (CELL_SIDE - 64) < width < 4.2 * CELL_SIDE and height < 1.2 * CELL_SIDE  # two pairs in one row
    assert (pixels == class_colour(0)).all(axis=2).any()


def test_without_images_no_sheet_is_written(tmp_path):
    views.save_detections(ShapesDataset(1), {}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_thousand_boxes_become_a_legend():
    boxes = torch.rand(1000, 2) * 280
    found = Detections(torch.linspace(0.9, 0.5, 1000), torch.arange(1000) % 3, torch.cat([boxes, boxes + 12], dim=1))
    annotations = np.concatenate([found.boxes.numpy(), (np.arange(1000) % 3)[:, None]], axis=1)
    judged = found, np.arange(1000) < 500, np.arange(1000) < 500
    picture = views.draw_detections(gradient(320, 320), annotations, *judged, NAMES)
    legend = picture[-40:, :320]
    assert all((legend == class_colour(label)).all(axis=2).sum() > 50 for label in range(3))
