import json
import re

import numpy as np
import pytest
from helpers import detections, gradient, save

from retinanet.data.dataset import DetectionDataset
from retinanet.evaluation import report, web_report
from retinanet.evaluation.thresholds import best_f1, rates_above
from retinanet.evaluation.voc import all_rankings

BOX, FAR = [0, 0, 10, 10], [30, 30, 44, 44]
NAMES = [
    "<script>alert(1)</script>",
    "$x_$",
    "\u05e9\u05dc\u05d5\u05dd \u6c7d\u8f66 \u202e",
    "a" * 500,
    "cut \ud83d \u2028",
]


def make(folder, rows, image_index, names=("a", "b"), files=("a.png",), **options):
    """A data set of images of 64 x 48 pixels, and boxes of x1, y1, x2, y2, label."""
    paths = [str(folder / name) for name in files]
    for path in paths:
        save(gradient(48, 64), path)
    rows = np.array(rows, dtype=np.float32).reshape(-1, 5)
    return DetectionDataset(paths, rows, np.array(image_index, dtype=int), list(names), **options)


def write(folder, dataset, found, **options):
    """The page's data, and the page."""
    evaluation = report.Evaluation(dataset, found)
    web_report.write(folder / "report.html", evaluation, "model.pt", True, **options)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]), text


def test_every_step_of_the_slider_has_the_numbers_of_the_thresholds(tmp_path):
    rng, rows, index, found = np.random.default_rng(0), [], [], {}
    for image in range(12):
        corners = rng.uniform(0, 30, (5, 2))
        boxes = np.hstack([corners, corners + 12, rng.integers(0, 3, (5, 1))])
        rows, index = [*rows, *boxes.tolist()], [*index, *[image] * 5]
        scores = np.sort(rng.choice([0.05, 0.3, 0.5, 0.7, *rng.random(8)], 10))[::-1]
        moved = np.vstack([boxes, boxes]) + np.hstack([rng.normal(0, 2, (10, 4)), np.zeros((10, 1))])
        found[image] = detections(*([score, row[4], *row[:4]] for score, row in zip(scores, moved, strict=True)))
    dataset = make(tmp_path, rows, index, "abc", [f"{image}.png" for image in range(12)])
    data, _ = write(tmp_path, dataset, found)
    evaluation, steps = report.Evaluation(dataset, found), np.array(data["steps"])
    rankings = all_rankings(evaluation.voc)
    assert len(rankings) == len(data["counts"]) == 4 and len(steps) > 101 and set(report.JSON_SCORES) <= set(steps)
    for ranking, counts, right, boxes, best in zip(
        rankings, *(data[name] for name in ("counts", "right", "boxes", "best")), strict=True
    ):
        counts, right = np.cumsum(counts), np.cumsum(right)
        with np.errstate(invalid="ignore"):
            rates = np.stack([right / np.where(counts, counts, np.nan), right / max(1, boxes)])
        np.testing.assert_array_equal(rates, rates_above(ranking, steps)[:2])
        np.testing.assert_array_equal(2 * right / (counts + boxes), rates_above(ranking, steps)[2])
        point = best_f1(ranking)
        assert (steps[best], right[best], counts[best] - right[best]) == (point.score, point.right, point.false)
    for image in data["images"]:  # the boxes that the slider shows are those that it counts
        index = int(image["path"].rsplit("/", 1)[1].removesuffix(".png"))
        for step, score in enumerate(steps):
            above = (found[index].scores.double() > score).sum()
            assert sum(one["level"] > step for one in image["found"]) == above


def test_scores_of_any_size_have_steps(tmp_path):
    dataset = make(tmp_path, [[*BOX, 0]], [0])
    for scores in ([1e300, 40, -3], [float("inf"), 0, -float("inf")], [7] * 3):
        found = detections(*([score, 0, *BOX] for score in scores))
        found = found._replace(scores=found.scores.double())
        steps = web_report.score_steps(*(all_rankings(report.Evaluation(dataset, {0: found}).voc), [None] * 3))["steps"]
        assert steps == sorted(set(steps)) and len(steps) > 50 and np.isfinite(steps).all()
        assert write(tmp_path, dataset, {0: found})[0]["images"]


def test_names_and_files_of_any_kind_stay_text(tmp_path):
    files = ["a'b\"c.png", "d#e?f%20.png", "\u6c7d </script>.png".replace("/", "\u2215"), "x<b>y.png"]
    dataset = make(tmp_path, [[*BOX, label] for label in range(5)], [0, 1, 2, 3, 3], NAMES, files)
    data, text = write(tmp_path, dataset, {image: detections([0.9, image, *FAR]) for image in range(4)})
    assert "<script>alert" not in text and "\u2028" not in text and text.count("</script>") == 2
    assert data["names"][:2] == NAMES[:2] and data["names"][3] == NAMES[3] and "$x_$" in text
    assert data["names"][2].endswith(r"\u202e") and data["names"][4] == r"cut \ud83d \u2028"
    assert {image["path"].rsplit("/", 1)[1] for image in data["images"]} == set(files)
    assert {image["file"] for image in data["images"]} == {f"image_00{number}.jpg" for number in range(4)}


@pytest.mark.parametrize("classes", [1, 3, 1000])
def test_nothing_found_or_nothing_to_find(tmp_path, classes):
    names = [f"class {label}" for label in range(classes)]
    cases = ([], detections()), ([], detections([0.9, 0, *BOX])), ([[*BOX, 0]], detections())
    for rows, found in cases[: 1 if classes == 1000 else 3]:
        data, text = write(tmp_path, make(tmp_path, rows, [0] * len(rows), names), {0: found})
        assert data["best"] == [None] * (classes + 1) and len(data["images"]) == bool(rows or len(found.scores))
        assert text.count('data-label="') >= classes
    assert len(data["curves"]) == min(classes, web_report.CURVE_LIMIT)


def test_images_that_cannot_be_read_are_shown_without_pixels(tmp_path):
    crowd = np.array([False, True, False])
    dataset = make(tmp_path, [[*BOX, 0], [*FAR, 0], [*BOX, 1]], [0, 0, 1], files=["a.png", "b.png"], difficult=crowd)
    (tmp_path / "a.png").unlink()
    found = {0: detections([0.9, 1, 20, 0, 90, 10]), 1: detections()}
    images = {image["path"][-5]: image for image in write(tmp_path, dataset, found)[0]["images"]}
    assert images["a"]["file"] is None and images["a"]["size"] == [44, 90]  # room for all boxes
    assert images["a"]["ignored"] == [FAR] and images["b"]["size"] == [48, 64]
    assert [path.name for path in (tmp_path / "report").iterdir()] == [images["b"]["file"]]


def test_an_earlier_report_is_replaced_and_other_files_stay(tmp_path):
    (tmp_path / "report").mkdir()
    for name in ("image_250.jpg", "mine.jpg"):
        (tmp_path / "report" / name).write_text("")
    dataset = make(tmp_path, [[*BOX, 0]], [0])
    write(tmp_path, dataset, {0: detections()})
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"image_000.jpg", "mine.jpg"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report").symlink_to(tmp_path / "report")
    with pytest.raises(ValueError, match="is a link"):
        write(tmp_path / "other", dataset, {0: detections()})


def test_only_images_that_count_are_described(tmp_path):
    dataset = make(tmp_path, [[*BOX, 0]] * 3, [0, 1, 1], files=["a.png", "b.png"])
    (tmp_path / "b.png").unlink()
    data, text = write(tmp_path, dataset, {0: detections()})
    assert "1 boxes in 1 images" in text and len(data["images"]) == 1 and len(dataset) == 2


def test_crowded_scores_can_be_told_apart(tmp_path):
    scores = 1 - np.geomspace(1e-6, 1e-3, 40)
    found = detections(*([score, 0, *BOX] for score in scores))
    data, _ = write(tmp_path, make(tmp_path, [[*BOX, 0]], [0]), {0: found})
    assert len(set(np.cumsum(data["counts"][-1]))) >= 15


def test_the_curves_of_a_training():
    log = [{"epoch": 0, "step": 9, "class_loss": 9.0}, {"epoch": 0, "class_loss": 0.5, "AP": -1.0}, {"epoch": 1}]
    assert web_report._training_curves(log) == {"loss": [("class loss", [(1, 0.5)])]}
    assert web_report._training_curves([]) == web_report._training_curves(log[:1]) == {}
