import os

import pytest
import torch

import train
from retinanet.data.shapes import ShapesDataset
from retinanet.errors import UserError
from retinanet.model import resnet18
from retinanet.training import checkpoint
from retinanet.training.resume import check_resume, find_checkpoint
from retinanet.training.run import Run
from retinanet.training.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    return resnet18(3)


@pytest.fixture
def settings(tmp_path):
    """A function that gives the settings of flags."""

    def resolve(*flags):
        all_flags = ["--dataset", "shapes", "--recipe", "scratch", "--precision", "fp32", "--out_dir", tmp_path, *flags]
        return Settings.resolve(vars(train.parse_arguments(list(map(str, all_flags)))), CPU)

    return resolve


def test_the_recipe_changes_the_model(net, settings):
    run = Run(settings("--recipe", "paper", "--batch_size", 2), net, CPU, ShapesDataset(5))
    assert net.training and not net.bn1.training and net.focalLoss.best_match_iou == 0.4
    assert run.steps_per_epoch == 3 and run.detector is net
    assert Run(settings("--ema", 0.9), net, CPU, ShapesDataset(5)).detector is not net
    assert net.bn1.training


def test_a_checkpoint_is_written_every_so_many_steps(net, settings, tmp_path):
    run = Run(settings("--checkpoint_every", 2), net, CPU, ShapesDataset(5))
    for saved in (False, True, False):
        run.progress.add(1.0, 1.0)
        run.after_step(0, float)
        assert (tmp_path / "last.pt").exists() == saved
        (tmp_path / "last.pt").unlink(missing_ok=True)


def test_a_checkpoint_is_written_every_so_many_minutes(net, settings, tmp_path):
    run = Run(settings("--checkpoint_every", "1m"), net, CPU, ShapesDataset(5))
    run.after_step(0, float)
    assert not (tmp_path / "last.pt").exists()
    run.saved_at -= 61
    run.after_step(0, float)
    assert (tmp_path / "last.pt").exists()


def test_the_best_validation_is_kept_and_later_ones_make_it_stale(net, settings, tmp_path):
    run = Run(settings("--early_stop", 2), net, CPU, ShapesDataset(5))
    for ap in (0.25, 0.5, 0.5, 0.25):
        assert not run.is_over
        run.metrics = {"AP": ap}
        run.end_epoch({"loss": 1.0})
    assert run.is_over and run.position == (4, 0) and run.best == 0.5
    assert checkpoint.load(tmp_path / "best.pt")["metrics"] == {"AP": 0.5}
    assert checkpoint.load(tmp_path / "last.pt")["metrics"] == {"AP": 0.25}


def test_weights_that_are_not_finite_are_not_saved(settings, tmp_path):
    net = resnet18(3)
    run = Run(settings(), net, CPU, ShapesDataset(5))
    run.save("a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    net.conv1.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match=r"a\.pt stays as it was: a weight is not finite in epoch 0, after step 0"):
        run.save("a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before


def test_flags_that_contradict_the_run_are_listed(net, settings, tmp_path):
    Run(settings("--lr", 0.1), net, CPU, ShapesDataset(5)).save_last()
    _, content = checkpoint.load_model(tmp_path / "last.pt")
    check_resume("last.pt", settings("--lr", 0.1, "--workers", 7, "--log_every", 9), content, ShapesDataset(5))
    content["training"]["args"]["clip_norm"] = None  # as earlier versions saved it
    check_resume("last.pt", settings("--lr", 0.1, "--batch_size", 1, "--accumulate", 2), content, ShapesDataset(5))
    with pytest.raises(UserError) as error:
        check_resume("last.pt", settings("--lr", 0.2, "--seed", 1, "--accumulate", 2), content, ShapesDataset(4))
    for part in (
        "--lr is 0.2, was 0.1", "--seed is 1, was 0", "--batch_size x --accumulate x processes is 4, was 2",
        "the training set has 4 images, had 5", "Repeat the flags",
    ):  # fmt: skip
        assert part in str(error.value)


def test_a_checkpoint_without_a_training_is_not_resumed(net, settings, tmp_path):
    Run(settings(), net, CPU, ShapesDataset(5)).save("best.pt")
    _, content = checkpoint.load_model(tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt: holds a model, .* start from it with --weights best\.pt"):
        check_resume("best.pt", settings(), content, ShapesDataset(5))


def test_the_checkpoint_to_resume(settings, tmp_path, caplog):
    assert find_checkpoint(settings()) is None
    assert find_checkpoint(settings("--resume", "auto")) is None and not caplog.text
    assert str(find_checkpoint(settings("--resume", "a/last.pt"))) == "a/last.pt"
    for number in (1, 2):
        (tmp_path / f"old_{number}").mkdir()
        (tmp_path / f"old_{number}" / "last.pt").write_text("")
    os.utime(tmp_path / "old_1" / "last.pt", (1, 1))
    assert find_checkpoint(settings("--resume", "auto")) is None
    assert "so a new run starts" in caplog.text and "old_2" in caplog.text
    (tmp_path / "last.pt").write_text("")
    assert find_checkpoint(settings("--resume", "auto")) == tmp_path / "last.pt"
