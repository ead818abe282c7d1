"""Runs that are interrupted, resumed, spread over processes, or go wrong."""

import argparse
import itertools
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
import traceback

import pytest
import torch
from conftest import fill_weights
from helpers import truncate, write_csv_data
from torch import distributed

import train
from retinanet import running
from retinanet.data.shapes import ShapesDataset
from retinanet.errors import UserError
from retinanet.model import resnet18
from retinanet.process import get_rank
from retinanet.signals import StopSignals
from retinanet.training import checkpoint, engine
from retinanet.training.log import read_log
from retinanet.training.recipes import Schedule

SLOW = pytest.mark.slow
FORK = multiprocessing.get_context("fork")
SMALL = ["--dataset", "shapes", "--shapes_train", "3", "--shapes_val", "2", "--min_side", "64", "--depth", "18"]
FLAGS = [*SMALL, "--weights", "none", "--batch_size", "1", "--device", "cpu", "--precision", "fp32", "--workers", "0"]
FLAGS += ["--log_every", "1", "--recipe", "scratch", "--epochs", "2"]
# All features that have a state or are random.
LIVELY = ["--ema", "0.9", "--random_crop", "0.5", "--colour_jitter", "0.3", "--flip", "both", "--rotate90"]
LIVELY += ["--scale_jitter", "0.5", "1.5", "--max_side", "96"]


pytestmark = pytest.mark.usefixtures("small_training")


def child(flags, environment, output, change):
    """The body of a process: train.py, as in a shell, with its output in a file."""
    os.environ.update(environment)
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    status = 1
    try:
        if change:
            change()
        status = train.main([str(flag) for flag in flags])
    except SystemExit as error:
        status = error.code
    except BaseException:  # noqa: BLE001, the process ends here
        traceback.print_exc()
    os._exit(status)


def start(folder, *flags, ranks=1, change=None):
    """Processes of one job, and a function that returns their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "test"}
    jobs = []
    output = folder.with_suffix(".txt")
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        arguments = ([*FLAGS, "--out_dir", folder, *flags], shared | place if ranks > 1 else {}, output, change)
        jobs.append(FORK.Process(target=child, args=arguments))
        jobs[-1].start()
    return jobs, lambda: output.read_text()


def finish(jobs, seconds=120):
    """Exit statuses of a job's processes."""
    for job in jobs:
        job.join(seconds)
        if job.exitcode is None:
            job.kill()
            pytest.fail(f"a process still ran after {seconds} s")
    return [job.exitcode for job in jobs]


def train_to_end(folder, *flags, ranks=1):
    jobs, output = start(folder, *flags, ranks=ranks)
    assert finish(jobs) == [0] * ranks, output()
    return output()


def entries_of(folder):
    """log.jsonl without the times."""
    lines = read_log(folder / "log.jsonl")
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def progress_of(folder):
    progress = checkpoint.load(folder / "last.pt")["training"]["progress"]
    return progress["epoch"], progress["step"]


def is_same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        ignored = {"out_dir", "log_size", "resume", "checkpoint_every", "workers"}
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one.keys() - ignored)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return one == other


def assert_same_run(folder, reference):
    for name in ("last.pt", "best.pt"):
        assert is_same(checkpoint.load(folder / name), checkpoint.load(reference / name)), name
    assert entries_of(folder) == entries_of(reference)


def once(module, name, call, action):
    """A change to a process: before the given call of a function, counted from 1, it runs `action`."""

    def change():
        original, calls = getattr(module, name), []

        def replaced(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                action()
            return original(*args, **kwargs)

        setattr(module, name, replaced)

    return change


def in_step(number, action):
    """A change to a process: it runs `action` in the given optimizer step, counted from 1."""
    return once(Schedule, "step", number, action)


def send(name):
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def on_rank_1(action):
    return lambda: action() if distributed.get_rank() == 1 else None


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An uninterrupted run with LIVELY, and how long it took."""
    folder = tmp_path_factory.mktemp("runs") / "reference"
    begin = time.monotonic()
    train_to_end(folder, *LIVELY, "--checkpoint_every", "1")
    return folder, time.monotonic() - begin


# Resuming


@pytest.mark.parametrize("step", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_a_killed_run_ends_like_one_that_nothing_interrupts(tmp_path, reference, step):
    flags = [*LIVELY, "--checkpoint_every", "1"]
    jobs, _ = start(tmp_path / "a", *flags, change=in_step(step, send("SIGKILL")))
    assert finish(jobs) == [-signal.SIGKILL]
    train_to_end(tmp_path / "a", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "a", reference[0])


def kill_and_resume(folder, reference, seconds, *flags, ranks=1):
    """Kill a run at a random moment of the reference's `seconds`; resumed, it must end like the reference."""
    jobs, _ = start(folder, *flags, ranks=ranks)
    time.sleep(random.uniform(0, seconds))
    for job in jobs:
        job.kill()
    finish(jobs)
    train_to_end(folder, *flags, "--resume", "auto", ranks=ranks)
    assert_same_run(folder, reference)


@SLOW
@pytest.mark.parametrize("seed", range(20))
def test_runs_killed_at_20_moments_end_alike(tmp_path, reference, seed):
    random.seed(seed)
    kill_and_resume(tmp_path / "a", *reference, *LIVELY, "--checkpoint_every", "1", "--workers", "1")


@SLOW
def test_two_killed_processes_end_alike(tmp_path):
    flags = [*LIVELY, "--shapes_train", "6", "--checkpoint_every", "1"]
    begin = time.monotonic()
    train_to_end(tmp_path / "reference", *flags, ranks=2)
    seconds = time.monotonic() - begin
    for seed in range(20):
        random.seed(seed)
        kill_and_resume(tmp_path / str(seed), tmp_path / "reference", seconds, *flags, ranks=2)


@SLOW
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_balanced_run_that_is_killed_ends_alike(tmp_path, ranks):
    flags = [*LIVELY, "--shapes_train", "6", "--balance", "1", "--accumulate", "2", "--checkpoint_every", "1"]
    printed = train_to_end(tmp_path / "reference", *flags, ranks=ranks)
    size = int(re.search(r"balance 1: 6 images seen as (\d+) an epoch", printed)[1])
    steps = [entry["step"] for entry in entries_of(tmp_path / "reference") if "step" in entry]
    assert size > 6 and steps == [*range(1, -(-size // (2 * ranks)) + 1)] * 2
    jobs, _ = start(tmp_path / "a", *flags, ranks=ranks, change=in_step(len(steps) // 2, send("SIGKILL")))
    finish(jobs)
    train_to_end(tmp_path / "a", *flags, "--resume", "auto", ranks=ranks)
    assert_same_run(tmp_path / "a", tmp_path / "reference")


@pytest.mark.parametrize(
    ("name", "status"),
    [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=SLOW), pytest.param("SIGUSR1", 138, marks=SLOW)],
)
def test_a_signal_saves_in_the_middle_of_an_epoch(tmp_path, reference, name, status):
    folder = tmp_path / "a"
    jobs, output = start(folder, *LIVELY, change=in_step(1, send(name)))
    assert finish(jobs) == [status]
    assert f"{name}: stopping after this step" in output() and "Traceback" not in output()
    assert progress_of(folder) == (0, 2)
    train_to_end(folder, *LIVELY, "--resume", "auto")
    assert_same_run(folder, reference[0])


def test_a_signal_before_the_first_step_saves_after_it(tmp_path):
    folder = tmp_path / "a"
    change = once(running.views, "save_data_images", 1, send("SIGTERM"))
    jobs, output = start(folder, *LIVELY, change=change)
    assert finish(jobs) == [143]
    assert "SIGTERM: stopping after this step" in output() and progress_of(folder) == (0, 1)


@SLOW
def test_a_signal_in_validation_saves_what_was_trained(tmp_path, reference):
    folder = tmp_path / "a"
    jobs, _ = start(folder, *LIVELY, change=once(running.detection, "detect", 1, send("SIGTERM")))
    assert finish(jobs) == [143]
    assert progress_of(folder) == (0, 3)
    train_to_end(folder, *LIVELY, "--resume", "auto")
    assert_same_run(folder, reference[0])


@SLOW
def test_a_second_signal_stops_at_once(tmp_path):
    def send_twice():
        send("SIGINT")()
        time.sleep(StopSignals.SAME_REQUEST_SECONDS + 0.1)
        send("SIGTERM")()

    jobs, _ = start(tmp_path / "a", change=in_step(2, send_twice))
    assert finish(jobs) == [143]
    assert not (tmp_path / "a" / "last.pt").exists()


def main_quietly(capsys, *flags):
    status = train.main([str(flag) for flag in (*FLAGS, *LIVELY, *flags)])
    return status, capsys.readouterr()


def test_a_run_with_other_flags_is_not_resumed_and_nothing_is_written(capsys, tmp_path, reference):
    flags = ["--resume", reference[0] / "last.pt", "--seed", 1, "--shapes_train", 4, "--out_dir", tmp_path]
    status, printed = main_quietly(capsys, *flags)
    assert status == 1 and "Traceback" not in printed.err
    assert "--seed is 1, was 0" in printed.err and "has 4 images, had 3" in printed.err
    assert not list(tmp_path.iterdir())


def test_a_run_from_before_a_flag_had_its_default(capsys, tmp_path, reference):
    content = checkpoint.load(reference[0] / "last.pt")
    for name in ("balance", "flip", "rotate90", "scale_jitter"):
        del content["training"]["args"][name]
    checkpoint.save(tmp_path / "last.pt", content)
    status, printed = main_quietly(capsys, "--resume", "auto", "--out_dir", tmp_path)
    assert status == 1 and "--flip is both, was 'horizontal'" in printed.err and "--rotate90 is True" in printed.err
    assert "--scale_jitter is" in printed.err and "--balance" not in printed.err


def test_a_complete_run_is_left_as_it_is(capsys, reference):
    before = (reference[0] / "last.pt").read_bytes()
    status, printed = main_quietly(capsys, "--resume", "auto", "--out_dir", reference[0])
    assert status == 0 and "done after 2 epochs" in printed.out
    assert (reference[0] / "last.pt").read_bytes() == before


# What is not trained


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW)])
def test_frozen_weights_stay_as_they_are_and_a_resumed_run_ends_alike(tmp_path, ranks):
    reference, again = tmp_path / "reference", tmp_path / "again"
    before = fill_weights(resnet18(3), seed=1, logit_scale=0.015, delta_scale=0.008).state_dict()
    checkpoint.save(tmp_path / "start.pt", before)
    flags = ["--recipe", "paper", "--weights", tmp_path / "start.pt", "--lr", "1e-2", "--backbone_lr", "0.5"]
    flags += ["--shapes_train", 2 * ranks, "--epochs", "1", "--shapes_val", "1", "--checkpoint_every", "1"]

    def keep_the_first_step():
        if get_rank() == 0:
            shutil.copytree(reference, again)

    jobs, output = start(reference, *flags, ranks=ranks, change=in_step(2, keep_the_first_step))
    assert finish(jobs) == [0] * ranks and progress_of(again) == (0, 1)
    assert "for 16 images), backbone x 0.5, 64 / 1024 pixels, global batch" in output()
    train_to_end(again, *flags, "--resume", "auto", ranks=ranks)
    assert_same_run(again, reference)
    content = checkpoint.load(again / "last.pt")
    same = {key for key, value in content["model"].items() if torch.equal(value, before[key])}
    fixed = {key for key in before if key.startswith(("conv1.", "layer1.")) or "bn" in key or ".downsample.1." in key}
    assert fixed <= same
    assert [key for key in same - fixed if not key.endswith("bias")] == []  # some biases change too little to see
    rates = [group["lr"] for group in content["training"]["optimizer"]["param_groups"]]
    assert rates == pytest.approx([1e-4, 2e-4, 5e-5])  # at the end; the backbone has no bias that is trained


# Many processes


@SLOW
def test_processes_and_accumulation_divide_the_same_batch(tmp_path):
    start_weights = fill_weights(resnet18(3), seed=1, logit_scale=0.015, delta_scale=0.008).state_dict()
    checkpoint.save(tmp_path / "start.pt", start_weights)
    flags = ["--recipe", "paper", "--freeze_stages", "0", "--shapes_train", "20", "--epochs", "1", "--shapes_val", "3"]
    flags += ["--weights", tmp_path / "start.pt", "--lr", "1e-5"]
    train_to_end(tmp_path / "one", *flags, "--batch_size", "4")
    train_to_end(tmp_path / "half", *flags, "--batch_size", "2", "--accumulate", "2")
    train_to_end(tmp_path / "two", *flags, "--batch_size", "2", ranks=2)
    expected = checkpoint.load(tmp_path / "one" / "last.pt")["model"]
    for name in ("half", "two"):
        found = checkpoint.load(tmp_path / name / "last.pt")["model"]
        for key in ("conv1.weight", "layer4.0.conv2.weight", "fpn.P3_2.weight", "regressionModel.output.weight"):
            change = (expected[key] - start_weights[key]).norm() / expected[key].norm()
            error = (found[key] - expected[key]).norm() / expected[key].norm()
            assert error <= 1e-5 and change > 100 * error, (name, key, error, change)
        for line, entry in zip(entries_of(tmp_path / "one"), entries_of(tmp_path / name), strict=True):
            assert entry == pytest.approx(line, rel=1e-4)


def test_a_rank_that_fails_ends_the_others(tmp_path):
    def fail():
        raise UserError("b.png: cannot be read")

    jobs, output = start(tmp_path / "a", "--shapes_train", "6", ranks=2, change=in_step(2, on_rank_1(fail)))
    assert finish(jobs, 60) == [1, 1]
    assert "error: rank 1: b.png: cannot be read" in output()
    assert "error: rank 0: another process of this job ended" in output() and "Traceback" not in output()


def test_all_ranks_stop_when_one_gets_a_signal(tmp_path):
    folder = tmp_path / "a"
    jobs, output = start(folder, "--shapes_train", "6", ranks=2, change=in_step(1, on_rank_1(send("SIGTERM"))))
    assert finish(jobs, 60) == [143, 143], output()
    assert progress_of(folder) == (0, 2)


# Faults


def test_a_loss_that_is_not_finite_keeps_the_batch_and_the_last_checkpoint(tmp_path):
    def change():
        normalize, numbers = engine.normalize, itertools.count(1)
        engine.normalize = lambda images: normalize(images) * (math.nan if next(numbers) == 3 else 1)

    folder = tmp_path / "a"
    jobs, output = start(folder, "--checkpoint_every", "1", change=change)
    assert finish(jobs) == [1]
    assert "the loss is not finite (class " in output() and "epoch 0, step 3, images" in output()
    assert progress_of(folder) == (0, 2)
    (batch,) = checkpoint.load(folder / "not_finite_rank0.pt")["batches"]
    assert batch["img"].shape == (1, 3, 64, 64) and f"(shapes-1-{batch['index'][0]}) is saved in" in output()


def test_a_dead_worker_names_its_image(tmp_path):
    def die_at_image_2(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index].copy()

    def change():
        ShapesDataset.load_image = die_at_image_2

    jobs, output = start(tmp_path / "a", "--workers", "1", change=change)
    assert finish(jobs) == [1]
    assert "error: a data-loading worker is killed by signal: Killed while it read shapes-1-2: " in output()


@pytest.mark.parametrize(("recipe", "saved"), [("original", True), ("scratch", False)])
def test_a_signal_that_stops_the_workers_too_saves_what_is_complete(tmp_path, recipe, saved):
    def stop_at_image_2(self, index):
        if index == 2:
            send("SIGTERM")()
            raise RuntimeError("DataLoader worker is killed")
        return self.images[index].copy()

    def change():
        ShapesDataset.load_image = stop_at_image_2

    jobs, output = start(tmp_path / "a", "--recipe", recipe, "--lr", "1e-9", change=change)
    assert finish(jobs) == [143]
    assert "DataLoader worker is killed" in output() and "Traceback" not in output()
    assert (tmp_path / "a" / "last.pt").exists() == saved


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_ends_the_training_with_its_name(tmp_path, workers):
    data, classes = write_csv_data(tmp_path)
    truncate(tmp_path / "b.png")
    flags = ["--dataset", "csv", "--csv_train", data, "--csv_classes", classes, "--workers", workers]
    jobs, output = start(tmp_path / "a", *flags)
    assert finish(jobs) == [1]
    assert f"error: {tmp_path / 'b.png'}: cannot be read as" in output() and "Traceback" not in output()


# The rest


@pytest.mark.parametrize(
    "flags", [["csv", "--csv_train", "a", "--csv_classes", "b"], ["coco", "--coco_path", "x", "--coco_val_set", "none"]]
)
def test_early_stop_needs_a_validation_set(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--dataset", *flags, "--early_stop", "3"])
    assert "--early_stop needs a validation set" in capsys.readouterr().err


def test_early_stop_and_ema(tmp_path):
    # With this rate nothing is learned, so the first AP stays the best.
    flags = ["--shapes_train", "1", "--epochs", "9", "--lr", "1e-9", "--early_stop", "1", "--ema", "0.5"]
    assert "done after 2 epochs" in train_to_end(tmp_path / "a", *flags)
    content = checkpoint.load(tmp_path / "a" / "last.pt")
    assert not is_same(content["model"], content["training"]["weights"])


@pytest.mark.parametrize(("text", "expected"), [("500", (500, "steps")), ("10m", (10, "minutes"))])
def test_intervals(text, expected):
    assert train.interval(text) == expected


@pytest.mark.parametrize(
    "text", ["0", "m", "5s", "-1", "1.5m", "+5", "1_000", "\N{ARABIC-INDIC DIGIT ONE}", "9" * 5000]
)
def test_a_wrong_interval_is_a_usage_error(text):
    with pytest.raises(argparse.ArgumentTypeError, match="steps, such as 500"):
        train.interval(text)
