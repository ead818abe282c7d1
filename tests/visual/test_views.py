import logging
import sys

import numpy as np
import pytest
import torch
from helpers import detections, gradient
from PIL import Image

from retinanet.data.loader import collater, make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Augmenter, Resizer, normalize
from retinanet.postprocess import Detections
from retinanet.visual import views
from retinanet.visual.drawing import CELL_SIDE, class_colour, draw_boxes

NAMES = ["circle", "rectangle", "triangle"]


def test_right_false_and_missed_differ_in_line_style():
    image = gradient(330, 340)
    annotations = np.array([[10, 30, 100, 120, 0], [200, 200, 300, 300, 1]], dtype=np.float32)
    found = detections((0.9, 0, 10, 30, 100, 119), (0.8, 2, 150, 40, 220, 110))
    right, hit = np.array([True, False]), np.array([True, False])
    picture = views.draw_detections(image, annotations, (found, right, hit), NAMES)
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
    picture = views.draw_detections(gradient(330, 340), annotations, (detections(*rows), right, hit), NAMES)
    assert picture.shape[1] > 680


class Images(ShapesDataset):
    """The first image is long and thin."""

    def load_image(self, index):
        return gradient(40, 1200) if index == 0 else super().load_image(index)


def test_a_sheet_has_one_scale(tmp_path):
    dataset = Images(3)
    one = detections((0.9, 0, 10, 10, 50, 50))
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
    picture = views.draw_detections(gradient(320, 320), annotations, judged, NAMES)
    legend = picture[-40:, :320]
    assert all((legend == class_colour(label)).all(axis=2).sum() > 50 for label in range(3))


def test_a_batch_is_shown_as_the_network_receives_it():
    samples = [Resizer(64, 96)({"img": gradient(48, 64), "annot": np.array([[4, 8, 24, 40, 1]])})]
    samples += [Resizer(64, 96)({"img": gradient(40, 60), "annot": np.zeros((0, 5))})]
    batch = collater(samples)
    sheet = views.draw_batch(batch, NAMES)
    again = views.draw_batch({**batch, "img": normalize(batch["img"])}, NAMES)
    assert np.abs(sheet.astype(int) - again).max() <= 1
    # 64 x 96, enlarged 6 times, after a gap; the box in its colour.
    gap = max(4, 6 * 96 // 60)
    assert tuple(sheet[gap + round(6 * 8 * 64 / 48), gap + 6 * 20]) == class_colour(1)
    assert batch["annot"][0, 0, 4] == 1 and batch["annot"][0, 0, 0] < 10  # the batch is as it was


def test_the_first_batch_is_the_loaders_first_batch(tmp_path):
    resizer = Resizer(64, 96)
    dataset = ShapesDataset(8, transform=lambda sample: resizer(Augmenter()(sample)))
    sampler = AspectRatioBasedSampler(dataset, 4, seed=3)
    expected = next(iter(make_loader(dataset, 4, 0, AspectRatioBasedSampler(dataset, 4, seed=3))))
    views.save_data_images(dataset, sampler, tmp_path)
    views.save_image(views.draw_batch(expected, NAMES), tmp_path / "expected.png")
    assert (tmp_path / "batch.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert (sampler.epoch, sampler.first_step) == (0, 0)


@pytest.mark.parametrize("installed", [True, False])
def test_without_matplotlib_a_warning_takes_the_place_of_the_chart(tmp_path, monkeypatch, caplog, installed):
    if installed:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    dataset = ShapesDataset(2, transform=Resizer(64, 96))
    with caplog.at_level(logging.INFO, "retinanet"):
        views.save_data_images(dataset, AspectRatioBasedSampler(dataset, 2), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"batch.png", *(["labels.png"] if installed else [])}
    assert ("no labels.png" in caplog.text and "pip install matplotlib" in caplog.text) != installed
