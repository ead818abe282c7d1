import os
import random
import signal

import numpy as np
import pytest
import torch

from retinanet import process
from retinanet.errors import UserError


@pytest.fixture
def logger():
    """The package's logger, put back after the test."""
    before = process.log.handlers, process.log.propagate, process.log.level
    yield process.log
    process.log.handlers, process.log.propagate = before[:2]
    process.log.setLevel(before[2])


@pytest.fixture
def rank_1(monkeypatch):
    monkeypatch.setattr(process.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(process.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(process.distributed, "get_world_size", lambda: 4)


# Scripts


def test_a_script_returns_0_and_hands_on_its_arguments():
    seen = []
    assert process.script(seen.append)(["--a"]) == 0
    assert process.script(seen.append)() == 0
    assert seen == [["--a"], None]


def raising(error):
    def main(argv):
        raise error

    return process.script(main)


def test_a_users_mistake_is_one_message_and_status_1(capsys):
    assert raising(UserError("a.csv:3: no"))([]) == 1
    assert capsys.readouterr() == ("", "error: a.csv:3: no\n")


def test_a_mistake_found_by_a_worker_is_the_same_message(capsys):
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    assert raising(UserError(text + "retinanet.process.UserError: b.png: cannot be read\n"))([]) == 1
    assert capsys.readouterr() == ("", "error: b.png: cannot be read\n")


def test_a_file_that_cannot_be_written_is_one_message_and_status_1(capsys):
    assert raising(OSError(30, "Read-only file system", "runs/log.jsonl"))([]) == 1
    assert capsys.readouterr() == ("", "error: runs/log.jsonl: Read-only file system\n")
    with pytest.raises(OSError, match="no file"):
        raising(OSError("no file"))([])


def test_a_message_of_several_lines_is_kept(capsys):
    assert raising(UserError("one\ntwo"))([]) == 1
    assert capsys.readouterr().err == "error: one\ntwo\n"


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, SystemExit])
def test_every_other_error_passes(error):
    with pytest.raises(error):
        raising(error("bug"))([])


def test_a_script_may_choose_its_status():
    assert process.script(lambda argv: 3)([]) == 3


# Messages


def test_messages_go_to_standard_output_once(logger, capsys):
    process.setup_logging()
    process.setup_logging()
    logger.info("%d boxes", 3)
    logger.debug("hidden")
    assert capsys.readouterr() == ("3 boxes\n", "")


def test_other_ranks_report_errors_alone(logger, capsys, rank_1):
    process.setup_logging()
    logger.info("hidden")
    logger.warning("hidden")
    logger.error("shown")
    assert capsys.readouterr().out == "shown\n"


def test_progress_gives_the_items_and_is_silent_without_a_terminal(capsys):
    assert list(process.progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_is_for_rank_0(rank_1):
    assert process.progress(range(3), "counting").disable


# Ranks, seeds, devices


def test_alone_this_is_rank_0_of_1():
    assert process.get_rank() == 0 and process.get_world_size() == 1 and process.is_main_process()


def test_ranks_are_those_of_torch(rank_1):
    assert process.get_rank() == 1 and process.get_world_size() == 4 and not process.is_main_process()


def test_a_seed_decides_all_generators():
    def draw(seed):
        process.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    first, again, other = draw(1), draw(1), draw(2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_inside_seeded_numbers_follow_from_the_seed_and_afterwards_go_on():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    process.seed_everything(0)
    expected = draw()
    process.seed_everything(0)
    with process.seeded(1, 2):
        first = draw()
    assert draw() == expected
    with process.seeded(1, 2):
        assert draw() == first
    with process.seeded(2, 1):
        assert draw() != first


def test_random_states_are_restored_from_a_file(tmp_path):
    torch.save(process.random_states(), tmp_path / "states.pt")
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    process.set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_alone_gathering_and_sending_are_nothing():
    assert process.gather_objects("a") == ["a"] and process.from_main_process("a") == "a"
    process.init_distributed(torch.device("cpu"))
    assert not process.distributed.is_initialized()


def test_auto_is_this_processs_gpu_or_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process.choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process.choose_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process.choose_device("auto") == torch.device("cuda:3")
    assert process.choose_device("cpu") == torch.device("cpu")
    assert process.choose_device("cuda:1") == torch.device("cuda:1")


def test_a_device_that_does_not_exist_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device cuda.*: .*try --device cpu"):
        process.choose_device("cuda")
    with pytest.raises(UserError, match="--device toaster: "):
        process.choose_device("toaster")
    with pytest.raises(UserError, match="--device meta: only cpu and cuda"):
        process.choose_device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"no GPU 2, as this machine has 2: .*--nproc_per_node"):
        process.choose_device("cuda:2")


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_auto_precision_is_bf16_where_the_cpu_has_it(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert process.choose_precision("auto", torch.device("cpu")) == expected
    assert process.choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert process.choose_precision("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_precision_is_bf16_where_the_gpu_has_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert process.choose_precision("auto", torch.device("cuda")) == expected


# Signals


def test_the_first_signal_is_a_wish_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with process.StopSignals() as stop:
        assert stop.signum == 0
        for signum in (signal.SIGINT, signal.SIGTERM):  # together they are one wish
            os.kill(os.getpid(), signum)
        assert stop.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_death_of_a_child_waits():
    before = signal.signal(signal.SIGCHLD, lambda *_: pytest.fail("disturbed"))
    try:
        with process.undisturbed():
            os.kill(os.getpid(), signal.SIGCHLD)
        assert callable(signal.getsignal(signal.SIGCHLD))
    finally:
        signal.signal(signal.SIGCHLD, before)


# Random states


def test_what_is_seeded_leaves_no_trace():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    process.seed_everything(1)
    expected = draw()
    process.seed_everything(1)
    with process.seeded(3, 4):
        inside = draw()
    assert draw() == expected != inside
    with process.seeded(3, 4):
        assert draw() == inside
    with process.seeded(4, 3):
        assert draw() != inside


def test_random_states_survive_a_checkpoint(tmp_path):
    torch.save(process.random_states(), tmp_path / "a.pt")
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    process.set_random_states(torch.load(tmp_path / "a.pt", weights_only=True))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


# Ranks without a job


def test_alone_gathering_gives_what_is_there():
    process.init_distributed(torch.device("cpu"))
    assert process.gather_objects(3) == [3] and process.from_main_process(3) == 3
    assert process.gather_tensors(torch.tensor([1.0, 2.0])).tolist() == [[1, 2]]
