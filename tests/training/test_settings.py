import json

import pytest
import torch

import train
from retinanet.training.settings import Settings

FLAGS = ["--dataset", "shapes", "--recipe", "paper", "--batch_size", "3", "--accumulate", "2", "--precision", "bf16"]


def resolve(*flags):
    return Settings.resolve(vars(train.parse_arguments([*FLAGS, *flags])), torch.device("cpu"))


def test_the_recipe_fills_what_the_flags_leave_open():
    settings = resolve("--recipe", "original")
    assert settings.global_batch == 6 and settings.lr == 1e-5 * 6 / 2 and settings.clip_norm == 0.1
    assert settings.precision == "bf16" and settings.dtype == torch.bfloat16
    assert resolve("--recipe", "paper").clip_norm is None
    assert (settings.freeze_stages, settings.backbone_lr, resolve().freeze_stages) == (0, 1, 2)
    assert resolve("--precision", "auto").precision in ("fp32", "bf16")


def test_the_flags_come_before_the_recipe():
    assert resolve("--freeze_stages", "0").freeze_stages == 0
    settings = resolve("--lr", "0.5", "--clip_norm", "7", "--precision", "fp32", "--checkpoint_every", "5")
    assert (settings.lr, settings.clip_norm, settings.dtype) == (0.5, 7, torch.float32)
    assert settings.checkpoint_every == (5, "steps")


def test_a_recipe_says_weights_epochs_sizes_and_average():
    names = ("weights", "epochs", "min_side", "max_side", "jitter", "ema", "freeze_stages")
    expected = {
        "original": ("imagenet", 100, 608, 1024, None, None, 0),
        "paper": ("imagenet", 100, 608, 1024, None, None, 2),
        "scratch": ("none", 100, 608, 1024, None, None, 0),
        "modern": ("imagenet_v2", 12, 800, 1333, [480, 800], 0.9998, 2),
    }
    for recipe, values in expected.items():
        assert tuple(getattr(resolve("--recipe", recipe), name) for name in names) == values
    assert resolve("--recipe", "modern", "--batch_size", "8").lr == pytest.approx(1e-4)


def test_a_given_flag_wins_over_modern():
    modern = ["--recipe", "modern"]
    settings = resolve(*modern, "--min_side", "320", "--ema", "0", "--depth", "18", "--epochs", "3")
    assert (settings.jitter, settings.ema, settings.weights, settings.epochs) == ([192, 320], None, "imagenet", 3)
    assert resolve(*modern, "--jitter", "800", "800").jitter == [800, 800]
    assert resolve(*modern, "--scale_jitter", "0.5", "2").jitter is None
    assert resolve(*modern, "--tile", "640").jitter is None
    assert resolve(*modern, "--weights", "coco", "--ema", "0.9").ema == 0.9


def test_every_flag_is_in_the_file():
    written = json.loads(json.dumps(resolve("--ema", "0.5").as_dict()))
    assert written.keys() == vars(train.parse_arguments(FLAGS)).keys() | {"global_batch"}
    assert (written["ema"], written["shapes_train"], written["out_dir"]) == (0.5, 400, "runs/train")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--scale_jitter", "2", "0.1"], "--scale_jitter 2 0.1 must be in rising order"),
        (["--scale_jitter", "0.1", "2", "--jitter", "400", "600"], "--jitter and --scale_jitter both choose the size"),
        (["--jitter", "600", "400"], "--jitter 600 400 must be in rising order, up to --max_side 1333"),
        (["--scale_jitter", "0.001", "2"], "--scale_jitter must be from 0.01 to 100"),
        (["--balance", "1.5"], "--balance must be from 1e-06 to 1"),
        (["--flip", "sideways"], "invalid choice: 'sideways'"),
    ],
)
def test_augmentation_that_contradicts_itself_is_a_usage_error(capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        resolve("--max_side", "1333", *flags)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_augmentation_is_part_of_a_run():
    settings = resolve("--flip", "both", "--rotate90", "--scale_jitter", "0.1", "2", "--balance", "0.01").as_dict()
    expected = {"flip": "both", "rotate90": True, "scale_jitter": [0.1, 2.0], "balance": 0.01}
    assert settings.items() >= expected.items()
    assert resolve("--recipe", "modern", "--scale_jitter", "0.1", "2").jitter is None
