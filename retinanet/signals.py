"""Signals, and processes that must end with their parents: the ranks of a torchrun job, and data-loading workers."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType


class StopSignals:
    """A context in which the first signal sets `signum`, so that the program stops soon; a second one stops it at once.

    With `in_program`, a second Ctrl-C, or press of a notebook's stop button, raises KeyboardInterrupt instead, because
    the program is the caller's.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    HANDLED = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
    # Ctrl-C reaches a torchrun job twice, from the terminal and from torchrun; both count as one request.
    SAME_REQUEST_SECONDS = 2.0

    def __init__(self, in_program: bool = False):
        self.in_program = in_program
        self.signum, self.since = 0, 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for signum in self.HANDLED:
                if signum.name == "SIGHUP" and signal.getsignal(signum) == signal.SIG_IGN:
                    continue  # as under nohup
                self.before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()
            text = f"{signal.Signals(signum).name}: stopping after this step; send it again to stop at once\n"
            with contextlib.suppress(OSError):  # the terminal may be gone, or the signal may have ended the reader
                os.write(sys.stderr.fileno(), text.encode())  # a handler must not touch buffered files
        elif time.monotonic() - self.since > self.SAME_REQUEST_SECONDS:
            if self.in_program and signum == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(128 + signum)


def end_with_parent() -> None:
    """Stop this rank, as SIGTERM does, when torchrun's own process is gone, because nothing else would."""
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within the context, signals that stop the program are blocked; processes that start here inherit the block."""
    if not hasattr(signal, "sigtimedwait"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopSignals.HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_worker(_: int = 0) -> None:
    """Let a data-loading worker, started within `held`, end only when its parent process asks for it or is gone.

    A signal to all processes of a job must not end the worker: the main process needs it to finish the step.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # away from the terminal's Ctrl-C
    if hasattr(signal, "sigtimedwait"):
        starter, parent = multiprocessing.parent_process().pid, os.getppid()

        def wait() -> None:
            received = None
            while os.getppid() == parent and (received is None or received.si_pid != starter):
                received = signal.sigtimedwait(StopSignals.HANDLED, 1)
            os._exit(0)

        threading.Thread(target=wait, daemon=True).start()


def resume_workers() -> None:
    """Let data-loading workers that are suspended continue, so that they can end."""
    if hasattr(signal, "SIGCONT"):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGCONT)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within the context, the death of a data-loading worker raises no error, which could come at any line."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
