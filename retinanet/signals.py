"""Signals, and processes that start and end with others: the ranks of a torchrun job, data-loading workers."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType


class StopSignals:
    """A context in which the first signal, `signum`, asks the program to stop soon; a second one stops it at once.

    With `in_program`, a second Ctrl-C, or the stop button of a notebook, raises KeyboardInterrupt instead: the program
    is the caller's.
    """

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    HANDLED = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
    # Ctrl-C reaches a torchrun job twice, from the terminal and from torchrun: that counts as one.
    SAME_REQUEST_SECONDS = 2.0

    def __init__(self, in_program: bool = False):
        self.in_program = in_program
        self.signum, self.since = 0, 0.0

    def __enter__(self) -> "StopSignals":
        # nohup ignores SIGHUP, and is not to be overruled.
        if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
            self.before = {}
            return self
        ignored = {signum for signum in self.HANDLED[3:] if signal.getsignal(signum) == signal.SIG_IGN}
        self.before = {signum: signal.signal(signum, self._handle) for signum in self.HANDLED if signum not in ignored}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if not self.signum:
            self.signum, self.since = signum, time.monotonic()
            text = f"{signal.Signals(signum).name}: stopping after this step; once more stops at once\n"
            with contextlib.suppress(OSError):  # the terminal may be gone, or the pipe's reader have got the signal too
                os.write(sys.stderr.fileno(), text.encode())  # a handler must not touch buffered files
        elif time.monotonic() - self.since > self.SAME_REQUEST_SECONDS:
            if self.in_program and signum == signal.SIGINT:
                raise KeyboardInterrupt
            os._exit(128 + signum)


def _wait_for_parent(pause: Callable[[], bool], end: Callable[[], None]) -> None:
    """Call `end`, in a thread, when the parent process is gone or `pause`, called again and again, gives True."""
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent and not pause():
            pass
        end()

    threading.Thread(target=wait, daemon=True).start()


def end_with_parent() -> None:
    """Stop this rank, as SIGTERM does, when torchrun's own process is gone: nothing else would."""

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        os._exit(128 + signal.SIGTERM)

    _wait_for_parent(lambda: bool(time.sleep(1)), end)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within the context, signals that stop the program wait; for processes that start here, until they take them."""
    signals = StopSignals.HANDLED if hasattr(signal, "sigtimedwait") else ()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals) if signals else ()
    try:
        yield
    finally:
        if signals:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def guard_worker(_: int = 0) -> None:
    """Let a data-loading worker, started within `held`, end only when its parent asks for it or is gone.

    A signal to all processes of a job must not end it: the main process decides, and needs it for the step to finish.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # away from the terminal's Ctrl-C
    if hasattr(signal, "sigtimedwait"):
        starter = multiprocessing.parent_process().pid

        def is_asked() -> bool:
            received = signal.sigtimedwait(StopSignals.HANDLED, 1)
            return received is not None and received.si_pid == starter

        _wait_for_parent(is_asked, lambda: os._exit(0))


def resume_workers() -> None:
    """Let data-loading workers that somebody stopped go on, or at least end."""
    for worker in multiprocessing.active_children() if hasattr(signal, "SIGCONT") else ():
        os.kill(worker.pid, signal.SIGCONT)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within the context, the death of a data-loading worker does not raise its error, which could come at any line."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
