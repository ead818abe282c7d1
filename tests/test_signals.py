import multiprocessing
import os
import signal
import sys
import time

import pytest
from helpers import broken_pipe

from retinanet import signals


def test_the_first_signal_is_noted_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with signals.StopSignals() as stop:
        assert stop.signum == 0
        for signum in (signal.SIGINT, signal.SIGTERM):  # so close together they count as one
            os.kill(os.getpid(), signum)
        assert stop.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_is_noted_where_nobody_reads_the_message(monkeypatch):
    with signals.StopSignals() as stop, broken_pipe() as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM


def test_a_second_ctrl_c_leaves_the_callers_program_running(monkeypatch):
    monkeypatch.setattr(signals.StopSignals, "SAME_REQUEST_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt), signals.StopSignals(in_program=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("handler", "noted"), [(signal.SIG_DFL, signal.SIGHUP), (signal.SIG_IGN, 0)], ids=["terminal", "nohup"]
)
def test_a_closed_terminal_is_a_request_unless_it_is_ignored(handler, noted):
    before = signal.signal(signal.SIGHUP, handler)
    try:
        with signals.StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum == noted
        assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def start_rank(connection):
    """A process of torchrun: it starts a rank, which ends with it, and then does nothing."""

    def rank():
        signals.end_with_parent()
        connection.send("ready")
        time.sleep(60)

    multiprocessing.get_context("fork").Process(target=rank).start()
    time.sleep(60)


def test_a_rank_ends_with_the_process_that_started_it():
    here, there = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=start_rank, args=(there,))
    parent.start()
    there.close()
    assert here.recv() == "ready"
    parent.kill()
    parent.join()
    with pytest.raises(EOFError):  # nobody holds the other end any more
        here.recv() if here.poll(10) else pytest.fail("the rank is alive")


def test_the_death_of_a_child_disturbs_nothing():
    before = signal.signal(signal.SIGCHLD, lambda *_: pytest.fail("disturbed"))
    try:
        with signals.undisturbed():
            os.kill(os.getpid(), signal.SIGCHLD)
        assert callable(signal.getsignal(signal.SIGCHLD))
    finally:
        signal.signal(signal.SIGCHLD, before)
