import io
import json
import os
import sys

import numpy as np
import pytest

import validate
from retinanet.data.shapes import CLASS_NAMES
from retinanet.training import checkpoint

SHAPES = ["--dataset", "shapes", "--shapes_val", "6", "--workers", "0"]


@pytest.fixture(scope="module")
def model_path(filled_net, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    checkpoint.save(path, checkpoint.model_entries(filled_net, CLASS_NAMES, 64, 64))
    return path


def run(*flags):
    return validate.main([*SHAPES, *map(str, flags)])


def test_everything_is_logged_and_written(model_path, tmp_path, capsys):
    assert run("--model", model_path, "--analyse", "--out", tmp_path / "out", "--iou_threshold", 0.4) == 0
    printed = capsys.readouterr().out
    for text in ("scores above 0.05", "6 images", *CLASS_NAMES, "IoU 0.4", "mAP", "missed"):
        assert text in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    charts = {"pr_curves.png", "thresholds.png"}  # errors and confusions are in report.html
    assert written == {"detections.json", "metrics.json", "report.html", "report", *charts}
    page = (tmp_path / "out" / "report.html").read_text()
    assert str(model_path) in page and "The anchors' reach" in page and "6 images" in page


@pytest.mark.usefixtures("no_pictures")
def test_scoring_the_written_detections_gives_the_same_numbers(model_path, tmp_path):
    assert run("--model", model_path, "--out", tmp_path / "a") == 0
    assert run("--detections", tmp_path / "a" / "detections.json", "--out", tmp_path / "b") == 0
    for name in ("metrics.json", "detections.json"):
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in "ab")
        assert first == second and len(first) > 10


@pytest.mark.usefixtures("no_pictures")
def test_batches_limits_and_thresholds(model_path, tmp_path):
    found = {}
    for name, flags in {"ones": ["--batch_size", 1], "fours": ["--batch_size", 4], "few": ["--limit", 2]}.items():
        assert run("--model", model_path, *flags, "--max_detections", 5, "--out", tmp_path / name) == 0
        found[name] = json.loads((tmp_path / name / "detections.json").read_text())
    assert len(found["ones"]) == 6 * 5 and {entry["image_id"] for entry in found["few"]} == {0, 1}
    for one, other in zip(found["ones"], found["fours"], strict=True):
        assert one["image_id"] == other["image_id"] and one["category_id"] == other["category_id"]
        np.testing.assert_allclose(one["bbox"], other["bbox"], atol=0.01)
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
    high = max(entry["score"] for entry in found["ones"])
    assert run("--model", model_path, "--score_threshold", high, "--out", tmp_path / "none") == 0
    assert json.loads((tmp_path / "none" / "detections.json").read_text()) == []


def test_detections_are_scored_without_images(tmp_path, capsys):
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "width": 50, "height": 50}, {"id": 6, "file_name": "b.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 5, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}],
    }
    (tmp_path / "annotations" / "instances_val2014.json").write_text(json.dumps(content))
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"image_id": 5, "category_id": 1, "bbox": [5, 5, 20, 20], "score": 0.5}]))
    data = ["--dataset", "coco", "--coco_path", str(tmp_path), "--coco_val_set", "val2014"]
    assert validate.main([*data, "--detections", str(results)]) == 0
    assert "2 images, 1 detection\nAP 1.000" in capsys.readouterr().out


@pytest.fixture
def odd_names(tmp_path):
    """The flags that score a data set whose classes have names that a terminal would obey, or cannot show."""
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 50, "height": 50}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(["red\x1b[31m\nline", "cut \ud83d", "汽车"])],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": i, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
            for i in range(3)
        ],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    entry = {"image_id": 1, "category_id": 0, "bbox": [5, 5, 20, 20], "score": 0.9}
    (tmp_path / "found.json").write_text(json.dumps([entry, {**entry, "category_id": 1}]))
    data = ["--dataset", "coco", "--coco_path", str(tmp_path), "--coco_val_set", "val"]
    return [*data, "--detections", str(tmp_path / "found.json"), "--analyse", "--out", str(tmp_path / "out")]


def test_names_reach_the_terminal_escaped(odd_names, capsys):
    assert validate.main(odd_names) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\ud83d" not in printed
    for text in (r"red\x1b[31m\nline  1.000", r"cut \ud83d ", "汽车 missed"):
        assert text in printed
    assert len({len(line) for line in printed.split("\n\n")[1].split("\n")}) == 1  # the columns are aligned


@pytest.mark.usefixtures("no_pictures")
def test_an_output_that_is_not_utf8_or_that_nobody_reads(odd_names, monkeypatch, capsys):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    assert validate.main(odd_names) == 0
    output.flush()
    assert rb"cut \ud83d " in output.buffer.getvalue() and b"mAP" in output.buffer.getvalue()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert validate.main(odd_names) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("no_pictures")
def test_a_results_file_is_scored_as_it_is(tmp_path, capsys):
    """Scores that are equal in float32, and boxes whose IoU is exactly 0.5."""
    box = [0.1, 0.2, 30.3, 40.7]
    content = {
        "images": [{"id": id, "file_name": f"{id}.jpg", "width": 50, "height": 50} for id in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "iscrowd": 0}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(content))
    half = {"image_id": 1, "category_id": 1, "bbox": [*box[:2], box[2] / 2, box[3]], "score": 0.5 + 1e-12}
    found = [{**half, "image_id": 2.0, "score": 0.5}, half]
    (tmp_path / "found.json").write_text(json.dumps(found))
    data = ["--dataset", "coco", "--coco_path", str(tmp_path), "--coco_val_set", "val"]
    flags = [*data, "--detections", str(tmp_path / "found.json"), "--out", str(tmp_path / "out")]
    assert validate.main(flags) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["AP50"] == pytest.approx(1)
    assert json.loads((tmp_path / "out/detections.json").read_text()) == found
    assert validate.main([*flags, "--limit", "1"]) == 0
    assert json.loads((tmp_path / "out/detections.json").read_text()) == [half]


def test_outputs_are_regular_files(model_path, tmp_path, capsys):
    os.mkfifo(tmp_path / "metrics.json")
    assert run("--model", model_path, "--limit", "1", "--out", tmp_path) == 1
    assert "metrics.json: exists and is not a regular file" in capsys.readouterr().err


def test_outputs_are_checked_before_inference(model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validate.api.detection, "detect", lambda *_, **__: pytest.fail("computed"))
    (tmp_path / "a" / "detections.json").mkdir(parents=True)
    (tmp_path / "b").write_text("")
    for name in "ab":
        assert run("--model", model_path, "--out", tmp_path / name) == 1
    assert "detections.json: exists and is not a regular file" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_a_warning(model_path, tmp_path, capsys):
    (tmp_path / "pr_curves.png").mkdir()
    assert not run("--model", model_path, "--limit", "1", "--out", tmp_path)
    assert "warning: no pr_curves.png: " in capsys.readouterr().out
    assert (tmp_path / "metrics.json").stat().st_size and (tmp_path / "thresholds.png").stat().st_size


def test_mistakes_in_files_are_reported(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("[{}]")
    assert run("--detections", tmp_path / "bad.json") == 1
    assert "bad.json: entry 0" in capsys.readouterr().err
    assert run("--model", tmp_path / "none.pt") == 1
    assert "none.pt" in capsys.readouterr().err


def test_contradictory_flags_are_reported_together(tmp_path, capsys):
    flags = ["--detections", "x.json", "--score_threshold", "0.5", "--top_k", "3", "--dataset", "voc"]
    with pytest.raises(SystemExit) as status:
        validate.main(flags)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert "needs --voc_path; " in error and "without --score_threshold and --top_k" in error
