import logging

import numpy as np
import pytest
from helpers import gradient

from retinanet.data.loader import collater, make_loader
from retinanet.data.sampler import AspectRatioBasedSampler
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Augmenter, Resizer, normalize
from retinanet.visual import data_views
from retinanet.visual.drawing import class_colour

NAMES = ["circle", "rectangle", "triangle"]


def test_a_batch_is_shown_as_the_network_receives_it():
    samples = [Resizer(64, 96)({"img": gradient(48, 64), "annot": np.array([[4, 8, 24, 40, 1]])})]
    samples += [Resizer(64, 96)({"img": gradient(40, 60), "annot": np.zeros((0, 5))})]
    batch = collater(samples)
    sheet = data_views.draw_batch(batch, NAMES)
    again = data_views.draw_batch({**batch, "img": normalize(batch["img"])}, NAMES)
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
    data_views.save_data_images(dataset, sampler, tmp_path)
    data_views.save_image(data_views.draw_batch(expected, NAMES), tmp_path / "expected.png")
    assert (tmp_path / "batch.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert (sampler.epoch, sampler.first_step) == (0, 0)


@pytest.mark.parametrize("installed", [True, False])
def test_without_matplotlib_a_warning_takes_the_place_of_the_chart(tmp_path, monkeypatch, caplog, installed):
    if installed:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    dataset = ShapesDataset(2, transform=Resizer(64, 96))
    with caplog.at_level(logging.INFO, "retinanet"):
        data_views.save_data_images(dataset, AspectRatioBasedSampler(dataset, 2), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"batch.png", *(["labels.png"] if installed else [])}
    assert ("no labels.png" in caplog.text and "pip install matplotlib" in caplog.text) != installed
