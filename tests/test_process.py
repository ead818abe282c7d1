import contextlib
import io
import random
import sys

import numpy as np
import pytest
import torch
from helpers import broken_pipe

from retinanet import process
from retinanet.errors import UserError


@pytest.fixture
def logger():
    """The package's logger, restored after the test."""
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


def test_a_script_passes_on_its_arguments_and_its_status():
    seen = []
    assert process.script(seen.append)(["--a"]) == 0
    assert process.script(seen.append)() == 0
    assert seen == [["--a"], None]
    assert process.script(lambda argv: 3)([]) == 3


def raising(error):
    def main(argv):
        raise error

    return process.script(main)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("a.csv:3: no"), "error: a.csv:3: no\n"),
        (UserError("one\ntwo"), "error: one\ntwo\n"),
        (OSError(30, "Read-only file system", "runs/log.jsonl"), "error: runs/log.jsonl: Read-only file system\n"),
    ],
)
def test_a_users_mistake_is_one_message_and_status_1(capsys, error, message):
    assert raising(error)([]) == 1
    assert capsys.readouterr() == ("", message)


def test_flags_that_the_machine_cannot_follow_are_a_usage_error(capsys):
    assert raising(process.UsageError("--precision fp16: no"))([]) == 2
    assert capsys.readouterr() == ("", "error: --precision fp16: no\n")


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, SystemExit, OSError])
def test_every_other_error_passes(error):
    with pytest.raises(error):
        raising(error("bug"))([])


def test_a_rank_says_its_number_and_that_another_is_gone(capsys, rank_1):
    assert raising(UserError("no"))([]) == 1
    assert raising(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"))([]) == 1
    assert capsys.readouterr().err == (
        "error: rank 1: no\nerror: rank 1: another process of this job ended; its own message says why\n"
    )
    with pytest.raises(RuntimeError, match="bug"):
        raising(RuntimeError("bug"))([])


# Messages


def test_messages_go_to_standard_output_once(logger, capsys):
    process.setup_logging()
    process.setup_logging()
    logger.info("%d boxes", 3)
    logger.debug("hidden")
    assert capsys.readouterr() == ("3 boxes\n", "")


def test_messages_go_to_standard_output_as_it_is_now(logger, capsys):
    with contextlib.redirect_stdout(io.StringIO()) as captured:
        process.setup_logging()
        logger.info("captured")
    logger.info("shown")
    assert (captured.getvalue(), capsys.readouterr().out) == ("captured\n", "shown\n")


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


@pytest.mark.parametrize(("terminal", "notebook"), [(False, False), (True, False), (False, True)])
def test_progress_is_shown_in_terminals_and_notebooks(monkeypatch, terminal, notebook):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    if notebook:
        monkeypatch.setattr(process.auto, "notebook_tqdm", type("Widget", (), {}))
    shown = terminal or notebook
    assert process.shows_progress() == shown
    assert process.progress((), "counting").disable != shown


def test_messages_that_nobody_reads_go_nowhere(logger, monkeypatch, capsys):
    with broken_pipe() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        process.setup_logging()
        for _ in range(3):
            logger.info("unread")
    logger.info("to a closed file")
    assert capsys.readouterr().err == ""


def test_a_console_without_a_letter_gets_its_number(logger, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stdout)
    process.setup_logging()
    logger.info("\u6c7d")
    assert stdout.buffer.getvalue().strip() == b"\\u6c7d"


def test_a_script_runs_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert raising(UserError("no"))([]) == 1
    monkeypatch.setattr(sys, "stderr", broken_pipe())
    assert raising(UserError("no"))([]) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_script_computes_in_float32_whatever_its_caller_does(dtype):
    torch.set_default_dtype(dtype)
    try:
        assert process.script(lambda _: torch.ones(1).dtype == torch.float32)([]) == 1
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)


# Seeds


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_a_seed_determines_all_generators():
    draws = []
    for seed in (1, 1, 2):
        process.seed_everything(seed)
        draws.append(draw())
    assert draws[0] == draws[1]
    assert all(a != b for a, b in zip(draws[0], draws[2], strict=True))


def test_within_seeded_numbers_follow_from_the_seed_and_afterwards_continue():
    process.seed_everything(0)
    expected = draw()
    process.seed_everything(0)
    with process.seeded(1, 2):
        first = draw()
    assert draw() == expected != first
    with process.seeded(1, 2):
        assert draw() == first
    with process.seeded(2, 1):
        assert draw() != first


def test_random_states_are_restored_from_a_file(tmp_path):
    torch.save(process.random_states(), tmp_path / "states.pt")
    expected = draw()
    process.set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert draw() == expected


# Devices


def test_auto_is_this_processs_gpu_or_apples_or_else_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert process.choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert process.choose_device("auto") == process.choose_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert process.choose_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert process.choose_device("auto") == process.choose_device("cuda") == torch.device("cuda:3")
    assert process.choose_device("cpu") == torch.device("cpu")
    assert process.choose_device("cuda:1") == torch.device("cuda:1")


def test_the_cpu_is_chosen_without_a_question_to_cuda(monkeypatch):
    def fail() -> bool:
        raise AssertionError("an old driver warns here")

    monkeypatch.setattr(torch.cuda, "is_available", fail)
    assert process.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, r"--device cuda: torch finds no CUDA device; try --device cpu"),
        ("toaster", 0, "--device toaster: "),
        ("meta", 0, "--device meta: only cpu, cuda and mps"),
        ("mps", 0, "--device mps: torch finds no Apple GPU; try --device cpu"),
        ("cuda:2", 2, r"there is no GPU 2, because this machine has 2, .*--nproc_per_node"),
    ],
)
def test_a_device_that_does_not_exist_is_an_error(monkeypatch, name, gpus, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        process.choose_device(name)


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [(False, False, torch.float32), (True, False, torch.bfloat16), (False, True, torch.bfloat16)],
)
def test_auto_precision_is_bf16_where_the_cpu_has_it(monkeypatch, avx512, amx, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert process.choose_precision("auto", torch.device("cpu")) == expected
    assert process.choose_precision("fp32", torch.device("cpu")) == torch.float32
    assert process.choose_precision("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_precision_is_bf16_where_the_gpu_has_it_or_else_fp16(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert process.choose_precision("auto", torch.device("cuda")) == expected
    assert process.choose_precision("fp16", torch.device("cuda")) == torch.float16


def test_precisions_that_a_device_lacks_are_usage_errors():
    assert process.choose_precision("auto", torch.device("mps")) == torch.float32
    for device, name, reason in (("cpu", "fp16", "this needs a GPU"), ("mps", "bf16", "mps supports only fp32")):
        with pytest.raises(process.UsageError, match=f"^--precision {name}: {reason}"):
            process.choose_precision(name, torch.device(device))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_network_computes_in_the_precision_that_was_chosen(precision):
    with process.autocast(torch.device("cpu"), precision):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == precision


# Ranks


def test_the_ranks_of_a_job_cannot_be_on_mps(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match="use one process or --device cpu"):
        process.init_distributed(torch.device("mps"))


def test_ranks_are_those_of_torch(rank_1):
    assert process.get_rank() == 1 and process.get_world_size() == 4 and not process.is_main_process()


def test_a_single_process_is_rank_0_of_1_and_exchange_changes_nothing():
    process.init_distributed(torch.device("cpu"))
    assert not process.distributed.is_initialized()
    assert process.get_rank() == 0 and process.get_world_size() == 1 and process.is_main_process()
    assert process.gather_objects("a") == ["a"] and process.from_main_process("a") == "a"
    assert process.gather_tensors(torch.tensor([1.0, 2.0])).tolist() == [[1, 2]]


# Files


def test_a_file_that_cannot_be_written_is_one_warning(caplog):
    warned = set()
    for _ in range(2):
        with process.optional("a.png", warned):
            raise UserError("the disk is full")
    assert caplog.messages == ["warning: no a.png: the disk is full"]
    with pytest.raises(RuntimeError), process.optional("a.png"):
        raise RuntimeError("bug")
