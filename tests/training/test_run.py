import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from retinanet.data.shapes import ShapesDataset
from retinanet.errors import UserError
from retinanet.model import resnet18
from retinanet.training import checkpoint
from retinanet.training import run as run_module
from retinanet.training.accounting import Progress
from retinanet.training.finite import NotFiniteError
from retinanet.training.resume import check_resume, find_checkpoint
from retinanet.training.run import Run
from retinanet.training.settings import Settings

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("small_network")


@pytest.fixture(scope="module")
def net(small_network):
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


@pytest.mark.parametrize(("flags", "stages"), [([], 2), (["--freeze_stages", 0], 0), (["--freeze_stages", 4], 4)])
def test_the_recipe_and_the_flags_say_what_is_frozen(settings, flags, stages):
    net = resnet18(3)
    Run(settings("--recipe", "paper", *flags), net, CPU, ShapesDataset(5))
    parts = [net.conv1, net.layer1[0].conv1, net.layer2[0].conv1, net.layer3[0].conv1, net.layer4[0].conv1]
    assert [part.weight.requires_grad for part in parts] == [index >= stages for index in range(5)]
    assert not net.layer4[0].bn1.weight.requires_grad and net.fpn.P6.weight.requires_grad


def test_the_gradient_scaler_is_continued(settings, tmp_path):
    fp16 = replace(settings(), precision="fp16")
    run = Run(fp16, resnet18(3), CPU, ShapesDataset(5))
    run.scaler.scale(torch.ones(()))  # it is made at the first use
    run.scaler.update(1024.0)
    run.save_last()
    again = Run(fp16, resnet18(3), CPU, ShapesDataset(5))
    content = checkpoint.load(tmp_path / "last.pt")
    again.restore("last.pt", content)
    assert again.scaler.get_scale() == 1024 and again.scaler.state_dict() == run.scaler.state_dict()
    for key, value in (("scale", 0.0), ("scale", float("inf")), ("scale", "x"), ("_growth_tracker", None)):
        content["training"]["scaler"] = run.scaler.state_dict() | {key: value}
        with pytest.raises(UserError, match=r"^last\.pt: its training cannot be continued"):
            again.restore("last.pt", content)


ENTRY = {"class_loss": 0.5, "box_loss": 0.25, "lr": 1e-4, "images_per_second": 8.0}


@pytest.mark.parametrize(("most", "steps"), [(1000, [2, 4, 2, 4]), (5, [4, 4])])
def test_without_a_progress_bar_steps_are_plain_lines(net, settings, monkeypatch, caplog, most, steps):
    caplog.set_level("INFO")
    monkeypatch.setattr(run_module, "MOST_LINES", most)
    run = Run(settings("--epochs", 2, "--log_every", 2, "--batch_size", 1), net, CPU, ShapesDataset(6))
    run.log, run.last_ap = SimpleNamespace(write=lambda entry: None), 0.123
    for epoch in range(2):
        for step in range(2, 7, 2):
            run.write_step({"epoch": epoch, "step": step, **ENTRY})
    assert [int(message.split("step ")[1].split()[0]) for message in caplog.messages] == steps
    assert caplog.messages[0].startswith(
        f"epoch 0, step {steps[0]} of 6: class loss 0.500, box loss 0.250, lr 1.0e-04, "
    )
    assert caplog.messages[0].endswith("8.0 images/s, AP 0.123")
    monkeypatch.setattr(run_module, "shows_progress", lambda: True)
    caplog.clear()
    run.write_step({"epoch": 1, "step": 4, **ENTRY})
    assert not caplog.messages


def test_the_time_left_is_that_of_the_steps_so_far(net, settings, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now[0])
    run = Run(settings("--epochs", 3, "--batch_size", 1), net, CPU, ShapesDataset(10))
    assert run.outlook() == ""
    for _ in range(5):
        run.progress.add(1.0, 1.0)
        run.after_step(0, float)
    now[0] = 160.0  # a minute for four steps; the first one, which is slow, does not count
    assert run.outlook() == ", 06:15 left"  # for 25
    run.progress, run.last_ap, now[0] = Progress(1), 0.5, 370.0  # nine steps and a validation: 30 s each
    assert run.outlook() == ", AP 0.500, 10:00 left"
    run.progress = Progress(3)
    assert run.time_left() == ""


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


def test_without_boxes_the_last_model_is_kept_as_best(net, settings, tmp_path):
    run = Run(settings("--early_stop", 2), net, CPU, ShapesDataset(5))
    for epoch in range(4):
        run.metrics = {"AP": -1.0}
        run.end_epoch({"loss": 1.0})
        assert checkpoint.load(tmp_path / "best.pt")["epoch"] == epoch + 1  # the last one
    assert not run.is_over


@pytest.mark.parametrize("signum", [0, 15])
def test_a_gradient_that_is_not_finite_is_reported_before_anything_is_saved(net, settings, tmp_path, signum):
    def check_norm():
        raise NotFiniteError("images 3", [])

    run = Run(settings("--checkpoint_every", 1), net, CPU, ShapesDataset(5))
    run.progress.add(1.0, 1.0)
    with pytest.raises(NotFiniteError, match="images 3"):
        run.after_step(signum, check_norm)
    assert not (tmp_path / "last.pt").exists()


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


def test_a_run_from_before_tiles_is_not_resumed_with_them(net, settings, tmp_path):
    Run(settings("--lr", 0.1), net, CPU, ShapesDataset(5)).save_last()
    _, content = checkpoint.load_model(tmp_path / "last.pt")
    for name in ("tile", "tile_overlap", "tile_background"):
        del content["training"]["args"][name]
    check_resume("last.pt", settings("--lr", 0.1), content, ShapesDataset(5))
    with pytest.raises(UserError, match=r"--tile is 64, was None; --tile_overlap is 0\.5"):
        check_resume("last.pt", settings("--lr", 0.1, "--tile", 64, "--tile_overlap", 0.5), content, ShapesDataset(5))


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


@pytest.fixture(scope="module")
def stepped(small_network, tmp_path_factory):
    """A function that returns a run of a recipe after one step, and what it saved."""
    made = {}

    def make(recipe):
        if recipe not in made:
            folder = tmp_path_factory.mktemp(recipe)
            flags = ["--dataset", "shapes", "--recipe", recipe, "--precision", "fp32", "--out_dir", str(folder)]
            settings = Settings.resolve(vars(train.parse_arguments([*flags, "--ema", "0.9"])), CPU)
            net = resnet18(3)
            run = Run(settings, net, CPU, ShapesDataset(5))
            for weight in net.parameters():
                weight.grad = torch.ones_like(weight) if weight.requires_grad else None
            run.optimizer.step()
            run.schedule.step()
            run.progress.add(1.0, 1.0)
            run.save_last()
            made[recipe] = settings, net, checkpoint.load(folder / "last.pt")
        return made[recipe]

    return make


def replaced(content, keys, value):
    """A copy of nested content with one value, at the end of `keys`, replaced."""
    if not keys:
        return value
    if isinstance(content, dict):
        return content | {keys[0]: replaced(content[keys[0]], keys[1:], value)}
    items = list(content)
    items[keys[0]] = replaced(items[keys[0]], keys[1:], value)
    return type(content)(items)


@pytest.mark.parametrize("recipe", ["original", "paper", "scratch"])
def test_a_run_restores_what_it_saved(stepped, recipe):
    settings, net, content = stepped(recipe)
    run = Run(settings, net, CPU, ShapesDataset(5))
    run.restore("last.pt", content)
    assert run.position == (0, 1) and run.ema.steps == 0
    groups = content["training"]["optimizer"]["param_groups"]
    assert run.optimizer.state_dict()["param_groups"] == groups
    assert run.schedule.scheduler.state_dict() == content["training"]["schedule"]


MOMENT = ("optimizer", "state", 0)
ALTERED = [
    (("optimizer",), {}), (("optimizer", "state"), [1]), (("optimizer", "state"), {10**6: {}}), (MOMENT, {}),
    (("optimizer", "state"), {}),
    ((*MOMENT, "exp_avg"), torch.zeros(3)), ((*MOMENT, "exp_avg"), torch.zeros(64, 3, 7, 7, dtype=torch.float16)),
    ((*MOMENT, "exp_avg_sq"), "x"), ((*MOMENT, "step"), torch.tensor(-1.0)), ((*MOMENT, "step"), torch.tensor(9.0)),
    ((*MOMENT, "exp_avg"), torch.full((64, 3, 7, 7), float("nan"))),
    ((*MOMENT, "exp_avg_sq"), torch.full((64, 3, 7, 7), -1e-9)), (("schedule", "_last_lr"), [float("nan")]),
    (("weights", "conv1.weight"), torch.full((64, 3, 7, 7), float("inf"))),
    (("weights", "bn1.running_var"), torch.full((64,), -1.0)),
    (("optimizer", "param_groups"), []), (("optimizer", "param_groups", 0, "lr"), float("nan")),
    (("optimizer", "param_groups", 0, "lr"), 1e9), (("optimizer", "param_groups", 0, "lr"), torch.ones(2)),
    (("schedule", "last_epoch"), 10**9), (("schedule", "last_epoch"), "x"), (("schedule",), None),
    (("progress", "step"), -1), (("progress", "step"), 10**6), (("progress", "epoch"), 0.5), (("progress",), {}),
    (("progress", "sums"), [1.0]), (("progress", "sums", 0), float("nan")), (("progress", "recent", 2), -5),
    (("best",), 7.0), (("stale",), -1), (("log_size",), -1), (("log_size",), "x"), (("ema_steps",), None),
    (("weights",), {}), (("weights", "conv1.weight"), torch.zeros(1)), (("random",), None), (("random", "torch"), 1),
    (("random", "numpy", 2), 10**6), (("random", "numpy", 1), torch.zeros(3)), (("random", "python"), (3, (), None)),
    (("random", "python", 2), "x"), ((), None), ((), [1]),
]  # fmt: skip


# A third of them run by default, all with `pytest -m "slow or not slow"`.
@pytest.mark.parametrize(
    ("keys", "value"),
    [pytest.param(*case, marks=[pytest.mark.slow] if number % 3 else []) for number, case in enumerate(ALTERED)],
)
def test_an_altered_training_is_one_message(stepped, keys, value):
    settings, net, content = stepped("scratch")
    altered = content | {"training": replaced(content["training"], keys, value)}
    with pytest.raises(UserError, match=r"^a\.pt: its training cannot be continued; .* --weights \(."):
        Run(settings, net, CPU, ShapesDataset(5)).restore("a.pt", altered)


@pytest.mark.parametrize(("key", "value"), [("best", float("nan")), ("num_bad_epochs", -1), ("_last_lr", [1e9])])
def test_an_altered_plateau_is_one_message(stepped, key, value):
    settings, net, content = stepped("original")
    altered = content | {"training": replaced(content["training"], ("schedule", key), value)}
    with pytest.raises(UserError, match=r"cannot be continued; .* \(.*out of range"):
        Run(settings, net, CPU, ShapesDataset(5)).restore("a.pt", altered)


def test_half_of_the_moments_are_no_state(stepped):
    settings, net, content = stepped("scratch")
    moments = content["training"]["optimizer"]["state"]
    half = dict(list(moments.items())[::2])
    altered = content | {"training": replaced(content["training"], ("optimizer", "state"), half)}
    with pytest.raises(UserError, match=r"cannot be continued; .* \(its optimizer has other weights\)"):
        Run(settings, net, CPU, ShapesDataset(5)).restore("a.pt", altered)


@pytest.mark.parametrize(
    "training", [None, {}, {"args": 3}, {"args": {}, "num_images": 5}, {"args": {}, "num_images": torch.ones(2)}]
)
def test_altered_flags_are_one_message(net, settings, training):
    content = {"class_names": list(ShapesDataset(5).labels.values()), "training": training}
    with pytest.raises(UserError, match=r"^a\.pt: its training cannot be continued"):
        check_resume("a.pt", settings(), content, ShapesDataset(5))
