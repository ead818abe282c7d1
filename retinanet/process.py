"""What every program needs to run: exit statuses, messages, seeds, devices, and the ranks of a torchrun job."""

import contextlib
import functools
import io
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import numpy as np
import torch
from torch import distributed
from tqdm import auto

from retinanet.errors import UserError, printable
from retinanet.signals import end_with_parent, resume_workers

log = logging.getLogger("retinanet")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's messages


class UsageError(UserError):
    """The flags ask for something that this machine cannot do; the scripts exit with 2."""


def script(main: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a script's `main` to return the exit status; a UserError becomes one message without a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # it is closed: a file that is opened later must not get descriptor 1 or 2
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, open until the end
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            status = main(argv) or 0
        except UserError as error:
            _say_error(str(error))
            return 2 if isinstance(error, UsageError) else 1
        except OSError as error:
            if error.filename is None:
                raise
            _say_error(f"{error.filename}: {error.strerror}")
            return 1
        except RuntimeError as error:
            if get_world_size() == 1 or not any(sign in str(error) for sign in LOST_PEER):
                raise
            _say_error("another process of this job ended; its own message says why")
            return 1
        finally:
            torch.set_default_dtype(dtype)
            resume_workers()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        return status

    return run


def _say_error(message: str) -> None:
    rank = f"rank {get_rank()}: " if get_world_size() > 1 else ""
    with contextlib.suppress(OSError):  # stderr may be closed
        sys.stderr.write(printable(f"error: {rank}{message}\n"))
        sys.stderr.flush()


class _Handler(logging.StreamHandler):
    """Writes `printable` messages; if their reader has ended, as after `| head`, they are dropped without an error."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """Standard output as it is now: a notebook's `%%capture` replaces it for a while."""
        return sys.stdout

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], OSError | ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


def setup_logging() -> None:
    """Log plain messages to standard output, on rank 0 only (other ranks log errors)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the console's encoding may lack letters of a name
    log.handlers = [_Handler()]
    log.propagate = False
    log.setLevel(logging.INFO if is_main_process() else logging.ERROR)


def show_log() -> None:
    """Set up logging for a function that logs results, unless the calling program has set up its own."""
    if not log.hasHandlers():
        setup_logging()


def shows_progress() -> bool:
    """Whether `progress` shows its bars: on rank 0, and in a terminal or a notebook."""
    in_notebook = auto.notebook_tqdm is not auto.std_tqdm
    return is_main_process() and (in_notebook or (sys.stderr is not None and sys.stderr.isatty()))


def progress(items: Iterable, description: str, total: int | None = None, initial: int = 0) -> auto.tqdm:
    """Show a progress bar over `items`, if `shows_progress()`."""
    hidden = not shows_progress()
    return auto.tqdm(items, description, total, initial=initial, disable=hidden, leave=False, dynamic_ncols=True)


@contextlib.contextmanager
def optional(what: str, warned: set[str] | None = None) -> Iterator[None]:
    """Within the context, the file `what` is written. An error must not end the program, so it becomes a warning.

    `warned` collects the names of such files, so that each is warned of only once.
    """
    warned = set() if warned is None else warned
    try:
        yield
    except (OSError, ValueError) as error:
        if what not in warned:
            log.warning("warning: no %s: %s", what, error)
        warned.add(what)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """The states of all random generators of this process, as tensors and plain types."""
    name, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the result of `random_states`."""
    name, keys, *rest = states["numpy"]
    if not 0 <= rest[0] <= len(keys) or not isinstance(states["python"][2], float | None):  # not checked by the setters
        raise ValueError("the state of a random generator is out of range")
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy(), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


@contextlib.contextmanager
def seeded(*seed: int) -> Iterator[None]:
    """Within the context, all random numbers follow from `seed`; afterwards the generators continue as before."""
    states = random_states()
    seed_everything(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    try:
        yield
    finally:
        set_random_states(states)


def choose_device(name: str) -> torch.device:
    """The device that `--device` means: `cuda` is this process's GPU; `auto` is that, or Apple's (mps), or the CPU.

    Raises:
        UserError: the device does not exist here.
    """
    # Asked only if it matters, because the question starts CUDA and warns of an old driver.
    is_available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    chosen = next(kind for kind, answer in is_available.items() if answer()) if name == "auto" else name
    if chosen == "cuda":
        chosen = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(chosen)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {error}") from error
    if device.type not in is_available:
        raise UserError(f"--device {name}: only cpu, cuda and mps are supported")
    if not is_available[device.type]():
        what = "CUDA device" if device.type == "cuda" else "Apple GPU"
        raise UserError(f"--device {name}: torch finds no {what}; try --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: there is no GPU {device.index}, because this machine has {torch.cuda.device_count()}, "
            "numbered from 0; choose another one, or lower --nproc_per_node"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The precision that `--precision` means: `auto` is bf16 where the device computes it natively, else fp16 or fp32.

    Raises:
        UsageError: the device has no such precision.
    """
    if name == "auto":
        if device.type == "cuda":
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
            name = "bf16"
        else:
            name = "fp32"
    if device.type == "mps" and name != "fp32":
        raise UsageError(f"--precision {name}: mps supports only fp32")
    if device.type == "cpu" and name == "fp16":
        raise UsageError("--precision fp16: this needs a GPU, as few CPUs support it; use bf16, fp32 or --device cuda")
    return PRECISIONS[name]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """A context in which a network on `device` computes in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return get_rank() == 0


def get_rank() -> int:
    """This process's number in a torchrun job; 0 outside one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes of a torchrun job; 1 outside one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def init_distributed(device: torch.device) -> None:
    """Join the other processes of a torchrun job, if there is one; `device` is the one that this process uses."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "TORCHELASTIC_RUN_ID" not in os.environ or distributed.is_initialized():
        return
    if device.type == "mps":
        raise UserError("torchrun does not support mps, which cannot share gradients; use one process or --device cpu")
    # gloo exchanges objects, the device's own backend exchanges gradients.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    end_with_parent()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks, on every rank."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    distributed.all_gather_object(values, value)
    return values


def gather_tensors(values: torch.Tensor) -> torch.Tensor:
    """[N] of each rank -> [ranks, N] on every rank, on the same device."""
    if get_world_size() == 1:
        return values[None]
    parts = [torch.empty_like(values) for _ in range(get_world_size())]
    distributed.all_gather(parts, values)
    return torch.stack(parts)


def from_main_process(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    if get_world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def broadcast_buffers(module: torch.nn.Module) -> None:
    """Copy the buffers of rank 0's module to all ranks."""
    if get_world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)
