"""`retinanet.train` and `retinanet.validate` do what the scripts do."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import retinanet
import train
import validate
from retinanet.data.dataset import DetectionDataset
from retinanet.data.shapes import ShapesDataset
from retinanet.data.transforms import Resizer
from retinanet.errors import UserError
from retinanet.model import resnet18
from retinanet.signals import StopSignals
from retinanet.training import checkpoint
from retinanet.training.log import read_log
from retinanet.training.settings import Settings

SETTINGS = {
    **{"depth": 18, "weights": "none", "recipe": "scratch", "epochs": 2, "batch_size": 2, "min_side": 32},
    **{"jitter": [32, 64], "ema": 0.9, "log_every": 1, "device": "cpu", "precision": "fp32", "workers": 0},
}


pytestmark = pytest.mark.usefixtures("small_training")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A result, the entries that its callbacks received, and the two data sets."""
    sets, calls = (ShapesDataset(4, seed=1), ShapesDataset(3, seed=0)), ([], [])
    told = dict(zip(("on_log", "on_validation"), (calls[0].append, calls[1].append), strict=True))
    return retinanet.train(*sets, out_dir=tmp_path_factory.mktemp("a"), **SETTINGS, **told), calls, sets


def test_the_script_and_the_function_train_the_same_weights(trained, tmp_path):
    flags = [
        word for name, value in SETTINGS.items() for word in (f"--{name}", *(value if name == "jitter" else [value]))
    ]
    flags += ["--dataset", "shapes", "--shapes_train", 4, "--shapes_val", 3, "--out_dir", tmp_path]
    assert train.main([*map(str, flags)]) == 0
    one, other = checkpoint.load(trained[0].last), checkpoint.load(tmp_path / "last.pt")
    assert one["model"].keys() == other["model"].keys()
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    assert one["training"]["progress"] == other["training"]["progress"] and one["metrics"] == other["metrics"]


def test_the_result_describes_the_run(trained):
    result, (entries, validations), sets = trained
    assert entries == read_log(result.log) and [entry["step"] for entry in entries if "step" in entry] == [1, 2, 1, 2]
    assert [one["epoch"] for one in validations] == [0, 1]
    assert validations[-1] == {"epoch": 1, **result.last_metrics} and len(result.metrics) == 12
    assert result.metrics["AP"] == max(one["AP"] for one in validations)
    assert result.metrics == checkpoint.load(result.best)["metrics"]
    saved = checkpoint.load(result.best)["model"]
    assert not result.model.training and torch.equal(result.model.state_dict()["conv1.weight"], saved["conv1.weight"])
    assert all(dataset.transform is None for dataset in sets)


def test_a_complete_run_gives_its_result_again(trained):
    result, _, sets = trained
    again = retinanet.train(*sets, out_dir=result.out_dir, resume="auto", **SETTINGS)
    assert dataclasses.asdict(again) == dataclasses.asdict(result)


def test_a_run_without_validation_on_a_set_with_its_own_transform(tmp_path):
    dataset = ShapesDataset(2, seed=1, transform=Resizer(32))
    settings = {name: value for name, value in SETTINGS.items() if name != "jitter"} | {"epochs": 1}
    result = retinanet.train(dataset, out_dir=tmp_path, **settings)
    assert (result.best, result.metrics, result.last_metrics) == (None, {}, {})
    assert result.model.num_classes == 3 and dataset.transform is not None


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_what_the_caller_has_switched_off_does_not_matter(switched_off, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        with switched_off():
            result = retinanet.train(ShapesDataset(2, seed=1), out_dir=tmp_path, **SETTINGS | {"epochs": 1})
            assert not torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert checkpoint.load(result.last)["model"]["conv1.weight"].dtype == torch.float32


def test_the_header_says_to_which_sizes_tiles_are_resized(tmp_path, caplog):
    settings = {name: value for name, value in SETTINGS.items() if name != "min_side"} | {"epochs": 1, "tile": 64}
    with caplog.at_level("INFO", "retinanet"):
        retinanet.train(ShapesDataset(2, seed=1), out_dir=tmp_path, **settings)
    assert ", tiles of 64 x 64, resized to 32 to 64 / 1024 pixels, global batch" in caplog.text


def test_settings_without_effect_on_a_sets_own_transform_are_an_error(tmp_path):
    dataset = ShapesDataset(2, seed=1, transform=Resizer(32))
    with pytest.raises(UserError, match="its own transform, so flip, rotate90 would have no effect"):
        retinanet.train(dataset, out_dir=tmp_path, flip="both", rotate90=True, jitter=None)


@pytest.mark.usefixtures("no_pictures")
def test_validation_by_the_function_and_by_the_script(trained, tmp_path):
    result, _, (_, val_set) = trained
    metrics = retinanet.validate(result.best, val_set, out=tmp_path / "a", device="cpu", precision="fp32", workers=0)
    assert metrics["AP"] == pytest.approx(result.metrics["AP"]) and len(metrics["classes"]) == 3
    assert retinanet.validate(result.model, ShapesDataset(3, 0, transform=Resizer(32)), device="cpu", precision="fp32")
    flags = ["--model", result.best, "--dataset", "shapes", "--shapes_val", 3, "--workers", 0, "--out", tmp_path / "b"]
    assert validate.main([*map(str, flags), "--device", "cpu", "--precision", "fp32"]) == 0
    one, other = ((tmp_path / name / "metrics.json").read_text() for name in "ab")
    assert one == other and json.loads(one) == json.loads(json.dumps(metrics))
    assert retinanet.validate(result.best, val_set, limit=1, max_detections=7, workers=0).keys() > {"AR7"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, "there is no setting 'epoch'; did you mean 'epochs'?"),
        ({"epochs": 0, "depht": 18}, "epochs must be from 1 to 10,000,000, not 0; there is no setting 'depht'"),
        ({"epochs": "3"}, "epochs must be a whole number, not '3'"),
        ({"lr": float("nan")}, "lr must be from"),
        ({"recipe": "scrach"}, "recipe must be one of .*did you mean 'scratch'"),
        ({"depth": 42}, "depth must be one of 18, 34, 50, 101, 152, not 42"),
        ({"jitter": [64]}, "jitter must be 2 numbers"),
        ({"jitter": [96, 64]}, "jitter 96 64 must be in rising order"),
        ({"tensorboard": 1}, "tensorboard must be True or False, not 1"),
        ({"out_dir": ""}, "out_dir must be a string, not ''"),
        ({"checkpoint_every": "5s"}, "checkpoint_every must be a number of steps"),
        ({"depth": 18, "weights": "coco"}, "--weights coco is a ResNet-50, not --depth 18"),
        ({"recipe": "modern", "max_side": 640}, "--max_side 640 is below --min_side 800"),
        ({"early_stop": 3}, "early_stop needs a validation set"),
        ({"batch_size": None}, "batch_size must be a whole number, not None"),
        ({"on_logs": print}, "there is no setting 'on_logs'"),
    ],
)
def test_a_wrong_setting_is_one_message(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        retinanet.train(ShapesDataset(1), **{"out_dir": tmp_path / "a"} | settings)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["on_log", "on_validation"])
def test_an_epoch_is_saved_before_the_callbacks_get_it(name, tmp_path):
    def fail(entry):
        if "step" not in entry:
            raise ConnectionError("the tracker is down")

    sets, settings = (ShapesDataset(2, seed=1), ShapesDataset(1, seed=0)), {**SETTINGS, "out_dir": tmp_path}
    with pytest.raises(ConnectionError):
        retinanet.train(*sets, **{name: fail}, **settings)
    assert checkpoint.load(tmp_path / "last.pt")["training"]["progress"]["epoch"] == 1


def test_the_program_survives_a_second_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignals, "SAME_REQUEST_SECONDS", 0.0)

    def stop(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        retinanet.train(ShapesDataset(2, seed=1), on_log=stop, out_dir=tmp_path, **SETTINGS)


def test_a_wrong_data_set_is_one_message():
    with pytest.raises(UserError, match="train_set must be a DetectionDataset, such as CSVDataset, not str"):
        retinanet.train("train.csv")
    with pytest.raises(UserError, match="val_set has no images"):
        retinanet.train(ShapesDataset(1), DetectionDataset([], [], [], ["a"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0, "precision": "fp99"}, "limit must be from 1 .*; precision must be one of auto, fp32"),
        ({"voc07": "no", "out": ""}, "voc07 must be True or False, not 'no'; out must be a string, not ''"),
        ({"model": (resnet18(3),)}, "model must be a path"),
        ({"score_threshold": 2}, "score_threshold must be from 0 to 1, not 2"),
        ({"model": 3}, "model must be a path, a RetinaNet or the result of load_model, not int"),
        ({"model": resnet18(5)}, "the model has 5 classes, but ShapesDataset has 3"),
        ({"dataset": "val.csv"}, "dataset must be a DetectionDataset, such as CSVDataset, not str"),
    ],
)
def test_a_wrong_argument_of_validate_is_one_message(arguments, message):
    with pytest.raises(UserError, match=message):
        retinanet.validate(**{"model": "none.pt", "dataset": ShapesDataset(1)} | arguments)


def test_the_settings_are_the_flags():
    flags = vars(train.parse_arguments(["--dataset", "shapes"]))
    data = {name for name in flags if name.split("_")[0] in ("dataset", "coco", "voc", "yolo", "csv", "shapes")}
    data |= {"val_share", "crowds_are_objects", "skip_bad", "pixel_range", "pixel_limit"}
    assert flags.keys() - data == Settings.defaults().keys()
    given = {name: flags[name] for name in Settings.defaults() if name != "checkpoint_every"}
    assert given == {name: value for name, value in Settings.defaults().items() if name != "checkpoint_every"}


def test_the_package_stays_light():
    code = "import sys, retinanet; assert 'torch' not in sys.modules; assert {'train', 'validate'} <= {*dir(retinanet)}"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})
