import warnings

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")
from boxes_data import make_dataset

from retinanet.data.shapes import ShapesDataset
from retinanet.visual import charts
from retinanet.visual.drawing import class_colour


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_names_are_shown_as_they_are():
    assert charts.chart_names(["$x_$", "_front", "a\x1bb"]) == [r"\$x_\$", " _front", "a b"]


def test_the_label_chart_has_bars_in_the_colours_of_the_classes(tmp_path):
    dataset = ShapesDataset(6)
    charts.draw_label_chart(dataset, tmp_path / "labels.png")
    pixels = read(tmp_path / "labels.png")
    counts = np.bincount(dataset.annotations[:, 4].astype(int), minlength=3)
    areas = np.array([(pixels == class_colour(label)).all(axis=2).sum() for label in range(3)])
    np.testing.assert_allclose(areas / areas.sum(), counts / counts.sum(), atol=0.05)


@pytest.mark.parametrize("names", [["car", "car "], ["$a$", "$a"], ["x" * 300 + "1", "x" * 300 + "2"]])
def test_classes_with_names_that_look_alike_keep_bars_of_their_own(tmp_path, names):
    dataset = make_dataset([[10, 10, 60, 60]] * 10, [0, 1] * 5, names=names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        charts.draw_label_chart(dataset, tmp_path / "labels.png")
    pixels = read(tmp_path / "labels.png")
    areas = [(pixels == class_colour(label)).all(axis=2).sum() for label in range(2)]
    assert areas[0] == pytest.approx(areas[1], rel=0.05) and areas[0] > 1000


def test_a_data_set_without_boxes_has_a_label_chart(tmp_path):
    charts.draw_label_chart(make_dataset([]), tmp_path / "labels.png")
    assert read(tmp_path / "labels.png").std() > 1


def test_a_hidden_or_formula_like_name_is_in_the_legend(tmp_path):
    curve = np.array([[0, 1], [1, 0.5]])
    blank = None
    for number, name in enumerate(["_front", "$x_$"]):
        charts.draw_curves({"IoU 0.5": {name: curve}}, tmp_path / f"{number}.png")
        pixels = read(tmp_path / f"{number}.png")
        legend = pixels[:80, -200:].min(axis=2) < 100
        assert legend.sum() > 40
        assert blank is None or not np.array_equal(legend, blank)
        blank = legend


@pytest.mark.parametrize("scored", [True, False])
def test_training_curves_show_losses_rate_and_scores(tmp_path, scored):
    steps = [{"epoch": 0, "step": step, "class_loss": 1 / step, "box_loss": 1.0, "lr": 0.01} for step in (1, 2, 3)]
    scores = {"AP": 0.5, "AP50": 0.8, "AP75": 0.4} if scored else {}
    epochs = [{"epoch": 0, "class_loss": 0.5, "box_loss": 1.0, **scores}]
    charts.draw_training_curves([*steps, *epochs], 3, tmp_path / "curves.png")
    pixels = read(tmp_path / "curves.png")
    assert pixels.shape[1] == (1650 if scored else 1100)
    assert all((pixels == colour).all(axis=2).any() for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)))


def test_thresholds_are_curves_with_their_best_points(tmp_path):
    names, scores = [*(f"class {label}" for label in range(49)), "all", "all"], np.linspace(0, 1, 11)
    rates = [np.stack([np.where(scores < 0.9, scores, np.nan), 1 - scores, np.full(11, 0.5)])] * len(names)
    marks = [None] * 49 + [None, (0.7, 0.7, 0.3, 0.5)]  # a class may have any name
    charts.draw_thresholds(names, scores, rates, [None] * len(names), tmp_path / "none.png")
    charts.draw_thresholds(names, scores, rates, marks, tmp_path / "one.png")
    black = [(read(tmp_path / name) == 0).all(axis=2) for name in ("none.png", "one.png")]
    columns = np.flatnonzero((black[1] & ~black[0]).any(axis=0))
    assert black[1].shape[1] == 1870 and len(np.flatnonzero(np.diff(columns) > 50)) == 2  # a dot in each of three
