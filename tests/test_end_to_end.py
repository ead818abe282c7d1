"""The three scripts, as a user runs them, on very little data."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import CLASSES, coco_content, write_coco_data, write_csv_data
from PIL import Image

import train
import validate
import visualize
from retinanet.evaluation.coco import METRICS, metric_names
from retinanet.training import checkpoint
from retinanet.training.log import read_log

SMALL = ["--device", "cpu", "--precision", "fp32", "--workers", "0"]
TRAIN = [*SMALL, "--depth", "18", "--weights", "none", "--recipe", "scratch", "--batch_size", "2", "--min_side", "64"]
SHAPES = ["--dataset", "shapes", "--shapes_train", "4", "--shapes_val", "2"]


pytestmark = pytest.mark.usefixtures("small_training")


def run_quietly(main, *flags):
    """Exit status, standard output and standard error of a script."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(flag) for flag in flags])
    return status, out.getvalue(), err.getvalue()


def entries_of(folder):
    """The entries of log.jsonl: of steps, and of epochs."""
    entries = read_log(folder / "log.jsonl")
    return [entry for entry in entries if "step" in entry], [entry for entry in entries if "step" not in entry]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run over two epochs of two steps each, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    flags = ["--epochs", 2, "--log_every", 1, "--out_dir", folder]
    status, out, err = run_quietly(train.main, *TRAIN, *SHAPES, *flags)
    assert (status, err) == (0, "")
    return folder, out


# Training


def test_training_writes_its_files(trained):
    folder, _ = trained
    assert {"args.json", "log.jsonl", "last.pt", "best.pt"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.tmp"))
    args = json.loads((folder / "args.json").read_text())
    assert (args["dataset"], args["depth"], args["min_side"], args["epochs"]) == ("shapes", 18, 64, 2)


def test_the_log_holds_every_step_and_every_epoch(trained):
    steps, epochs = entries_of(trained[0])
    assert [entry["epoch"] for entry in steps] == [0, 0, 1, 1]
    assert [entry["epoch"] for entry in epochs] == [0, 1]
    for entry in steps:
        assert entry["class_loss"] > 0 and entry["box_loss"] > 0
        assert entry["lr"] > 0 and entry["images_per_second"] > 0
    for entry in epochs:
        of_epoch = [step for step in steps if step["epoch"] == entry["epoch"]]
        for name in ("class_loss", "box_loss"):
            assert entry[name] == pytest.approx(sum(step[name] for step in of_epoch) / 2, rel=1e-4)
        assert entry["loss"] == pytest.approx(entry["class_loss"] + entry["box_loss"])
        assert set(METRICS) <= set(entry) and all(-1 <= entry[name] <= 1 for name in METRICS)


def test_the_header_says_what_runs(trained):
    header = trained[1]
    for text in ("shapes", "4 images", "3 classes", "ResNet-18", "cpu", "scratch", torch.__version__):
        assert text in header
    assert "does not learn" not in header


def test_the_checkpoint_rebuilds_the_model(trained):
    net, info = checkpoint.load_model(trained[0] / "last.pt")
    assert info["class_names"] == CLASSES and net.num_classes == 3
    assert info["min_side"] == 64
    assert all(value.isfinite().all() for value in net.state_dict().values())


@pytest.mark.usefixtures("no_pictures")
def test_the_checkpoint_holds_limits_and_the_best_scores(tmp_path):
    limits = ["--max_detections", 7, "--score_threshold", 0.001, "--top_k", 50, "--nms_threshold", 0.4]
    flags = [*TRAIN, *SHAPES, "--epochs", 1, *limits, "--out_dir", tmp_path]
    status, out, _ = run_quietly(train.main, *flags)
    assert status == 0 and "AR7 " in out and "AR7" in entries_of(tmp_path)[1][0]
    content = checkpoint.load(tmp_path / "best.pt")
    assert content["limits"] == {"score_threshold": 0.001, "nms_threshold": 0.4, "top_k": 50, "max_detections": 7}
    best = content["score_thresholds"]
    assert best == {} or (0 < best["all"] < 1 and set(best["classes"]) <= set(CLASSES))
    flags = [*SMALL, "--dataset", "shapes", "--shapes_val", 2, "--model", tmp_path / "best.pt", "--out", tmp_path / "v"]
    assert "2 images, 14 detections" in run_quietly(validate.main, *flags)[1]
    metrics = json.loads((tmp_path / "v" / "metrics.json").read_text())
    assert (metrics["best_f1"] or {"score": None})["score"] == best.get("all")


def test_training_again_gives_the_same_numbers(trained, tmp_path):
    flags = [*TRAIN, *SHAPES, "--epochs", 1, "--log_every", 1, "--out_dir", tmp_path]
    assert run_quietly(train.main, *flags)[0] == 0
    steps, again = entries_of(trained[0])[0][:2], entries_of(tmp_path)[0]
    for name in ("class_loss", "box_loss", "grad_norm"):  # those of the second step follow from the first step's update
        assert [step[name] for step in again] == [step[name] for step in steps]


def test_random_weights_with_the_original_recipe_give_a_warning(tmp_path):
    status, out, err = run_quietly(train.main, *csv_training(tmp_path), "--recipe", "original")
    assert (status, err) == (0, "")
    assert re.search("warning: .*original.*random weights.*--recipe scratch", out)
    assert (tmp_path / "run" / "last.pt").exists()  # even without a validation set


def test_coco_data_are_trained_on_and_scored(tmp_path):
    root = write_coco_data(tmp_path)
    write_coco_data(tmp_path, set_name="train2017")
    flags = [*TRAIN, "--batch_size", 4, "--epochs", 1, "--out_dir", tmp_path / "run"]
    flags += ["--dataset", "coco", "--coco_path", root]
    status, out, err = run_quietly(train.main, *flags)
    assert (status, err) == (0, "")
    assert "2 classes" in out and "3 images" in out
    assert checkpoint.load(tmp_path / "run" / "last.pt")["class_names"] == ["car", "cat"]


# Validation and images


def test_validation_prints_the_twelve_numbers(trained):
    flags = [*SMALL, "--dataset", "shapes", "--shapes_val", 2, "--model", trained[0] / "last.pt"]
    status, out, err = run_quietly(validate.main, *flags, "--score_threshold", 0, "--max_detections", 7)
    assert (status, err) == (0, "")
    assert "2 images, 14 detections" in out
    for name in metric_names(7):
        assert re.search(rf"\b{name} -?\d\.\d\d\d", out)


def test_validation_gives_the_numbers_of_training(trained):
    flags = [*SMALL, "--dataset", "shapes", "--shapes_val", 2, "--model", trained[0] / "last.pt"]
    out = run_quietly(validate.main, *flags)[1]
    last = entries_of(trained[0])[1][-1]
    for name in METRICS:
        assert re.search(rf"\b{name} (-?\d\.\d\d\d)", out)[1] == f"{last[name]:.3f}"


def test_visualize_writes_one_sheet_of_pairs(trained, tmp_path):
    flags = [*SMALL, "--dataset", "shapes", "--shapes_val", 3, "--model", trained[0] / "best.pt"]
    flags += ["--limit", 2, "--columns", 1, "--score_threshold", 0, "--max_detections", 5, "--out_dir", tmp_path / "p"]
    status, out, err = run_quietly(visualize.main, *flags)
    assert (status, err) == (0, "")
    path = tmp_path / "p" / "detections.png"
    assert str(tmp_path / "p") in out
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        width, height = sheet.size
    assert width > 2 * 320 and height > 2 * 320  # two rows of ground truth beside detections, enlarged to be legible
    assert width < 2.6 * height


def test_a_model_of_other_classes_is_refused(trained, tmp_path):
    root = write_coco_data(tmp_path)
    flags = [*SMALL, "--dataset", "coco", "--coco_path", root, "--model", trained[0] / "last.pt"]
    for script in (validate, visualize):
        status, _, err = run_quietly(script.main, *flags)
        assert status == 1
        assert all(name in err for name in ("circle", "car", "last.pt")) and "Traceback" not in err


# Usage errors


@pytest.mark.parametrize(
    ("script", "flags", "reported"),
    [
        (train, [], ["--dataset"]),
        (train, ["--dataset", "csv"], ["--csv_train"]),
        (
            train,
            ["--dataset", "csv", "--min_side", "600", "--max_side", "300"],
            ["--csv_train", "--max_side 300 is below --min_side 600"],
        ),
        (train, ["--dataset", "coco", "--max_side", "100"], ["--coco_path", "--max_side 100", "--min_side 608"]),
        (train, ["--dataset", "shapes", "--epochs", "0"], ["--epochs", "at least 1"]),
        (train, ["--dataset", "shapes", "--depth", "42"], ["--depth", "18", "152"]),
        (validate, ["--dataset", "csv", "--model", "x"], ["--csv_val"]),
        (visualize, ["--dataset", "csv", "--model", "x"], ["--csv_val"]),
        (validate, ["--dataset", "shapes"], ["--model"]),
    ],
)
def test_a_usage_error_reports_all_contradictions_at_once(script, flags, reported):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as status:
        script.main(flags)
    assert status.value.code == 2
    message = err.getvalue().strip().splitlines()[-1]  # before it: the usage
    assert "error: " in message
    for text in reported:
        assert text in message


@pytest.mark.parametrize("name", ["train", "validate", "visualize"])
def test_the_shell_gets_the_status(monkeypatch, name):
    def status_of(*flags):
        monkeypatch.setattr(sys, "argv", [name, *flags])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as status:
            runpy.run_path(str(Path(train.__file__).with_name(f"{name}.py")), run_name="__main__")
        return status.value.code

    assert status_of("--help") == 0
    assert status_of("--dataset", "shapes", "--no_such_flag") == 2
    flags = ["--model", "missing.pt"] if name != "train" else ["--weights", "none"]
    assert status_of("--dataset", "coco", "--coco_path", "/no/such/folder", *flags) == 1


# Users' mistakes


def assert_one_message(status, err, *parts):
    """Status 1, and one line on standard error that holds all parts."""
    assert status == 1
    assert "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err


def csv_training(folder, lines=None):
    """Flags to train for an epoch on CSV data that this writes."""
    data, classes = write_csv_data(folder, lines)
    flags = ["--dataset", "csv", "--csv_train", data, "--csv_classes", classes]
    return [*TRAIN, *flags, "--epochs", 1, "--out_dir", folder / "run"]


GOOD = "a.png,4,8,24,40,rectangle"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("b.png,4,8,24,40,hexagon", ["data.csv:2", "hexagon", "circle"]),  # unknown class
        ("b.png,24,8,4,40,circle", ["data.csv:2", "x1 < x2", "24,8,4,40"]),
        ("b.png,4,8,24,circle", ["data.csv:2", "5 columns"]),  # missing column
        ("b.png,4,8,nan,40,circle", ["data.csv:2"]),
        ("gone.png,4,8,24,40,circle", ["data.csv:2", "gone.png"]),  # missing image
    ],
)
def test_a_bad_csv_line_stops_training_with_file_and_line(tmp_path, line, parts):
    status, _, err = run_quietly(train.main, *csv_training(tmp_path, [GOOD, line, "b.png,,,,,"]))
    assert_one_message(status, err, *parts)
    assert not list(tmp_path.glob("run/*.pt*"))


@pytest.mark.parametrize("script", [validate, visualize])
def test_bad_data_stop_the_other_scripts_too(trained, tmp_path, script):
    data, classes = write_csv_data(tmp_path, [GOOD, "b.png,4,8,24,40,hexagon"])
    flags = [*SMALL, "--dataset", "csv", "--csv_val", data, "--csv_classes", classes, "--model", trained[0] / "last.pt"]
    status, _, err = run_quietly(script.main, *flags)
    assert_one_message(status, err, "data.csv:2", "hexagon")


def test_a_coco_file_without_categories_stops_training(tmp_path):
    content = coco_content()
    del content["categories"]
    root = write_coco_data(tmp_path, content, set_name="train2017")
    status, _, err = run_quietly(train.main, *TRAIN, "--dataset", "coco", "--coco_path", root, "--out_dir", tmp_path)
    assert_one_message(status, err, "instances_train2017.json", "categories")


def test_a_validation_set_of_other_classes_stops_training(tmp_path):
    content = coco_content()
    write_coco_data(tmp_path, content, set_name="train2017")
    content["categories"] = [{"id": 3, "name": "car"}, {"id": 5, "name": "bus"}, {"id": 17, "name": "cat"}]
    write_coco_data(tmp_path, content, set_name="val2017")
    status, _, err = run_quietly(
        train.main, *TRAIN, "--dataset", "coco", "--coco_path", tmp_path, "--out_dir", tmp_path
    )
    assert_one_message(status, err, "instances_val2017.json", "the training set lacks 'bus'")


@pytest.mark.parametrize("script", [validate, visualize])
def test_a_checkpoint_that_is_missing_or_damaged_is_one_message(tmp_path, script):
    flags = [*SMALL, "--dataset", "shapes", "--shapes_val", 1]
    status, _, err = run_quietly(script.main, *flags, "--model", tmp_path / "gone.pt")
    assert_one_message(status, err, "gone.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    status, _, err = run_quietly(script.main, *flags, "--model", tmp_path / "text.pt")
    assert_one_message(status, err, "text.pt")


def test_a_device_or_folder_that_cannot_be_used_is_one_message(tmp_path):
    status, _, err = run_quietly(train.main, *TRAIN, *SHAPES, "--device", "toaster")
    assert_one_message(status, err, "--device toaster")
    (tmp_path / "file").write_text("")
    status, _, err = run_quietly(train.main, *TRAIN, *SHAPES, "--out_dir", tmp_path / "file")
    assert_one_message(status, err, f"--out_dir {tmp_path / 'file'}")
