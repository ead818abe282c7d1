import json

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
    assert written == {"detections.json", "metrics.json", "pr_curves.png", "errors.png", "confusion.png"}


def test_scoring_the_written_detections_gives_the_same_numbers(model_path, tmp_path):
    assert run("--model", model_path, "--out", tmp_path / "a") == 0
    assert run("--detections", tmp_path / "a" / "detections.json", "--out", tmp_path / "b") == 0
    for name in ("metrics.json", "detections.json"):
        first, second = (json.loads((tmp_path / folder / name).read_text()) for folder in "ab")
        assert first == second and len(first) > 10


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


def test_mistakes_in_files_are_reported(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("[{}]")
    assert run("--detections", tmp_path / "bad.json") == 1
    assert "bad.json: entry 0" in capsys.readouterr().err
    assert run("--model", tmp_path / "none.pt") == 1
    assert "none.pt" in capsys.readouterr().err


def test_contradictory_flags_are_reported_together(tmp_path, capsys):
    flags = ["--detections", "x.json", "--score_threshold", "0.5", "--max_detections", "3", "--dataset", "voc"]
    with pytest.raises(SystemExit) as status:
        validate.main(flags)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert "needs --voc_path; " in error and "without --score_threshold and --max_detections" in error
