"""Process plumbing: errors for users, progress bars, seeds, devices, and the ranks of a torchrun job."""

import functools
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

log = logging.getLogger("retinanet")


class UserError(ValueError):
    """A mistake that the user can mend: the scripts print its message, which says where and how, and exit with 1."""


def script(main: Callable[..., None]) -> Callable[..., int]:
    """Decorate a script's `main`: it returns the exit status, and a user's mistake becomes one clear message."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except UserError as error:
            # A data-loading worker sends its traceback as the message; what the user needs is its last line.
            message = str(error).strip().splitlines()[-1] if "Traceback" in str(error) else str(error)
            sys.stderr.write(f"error: {message.removeprefix('retinanet.utils.UserError: ')}\n")
            return 1
        return 0

    return run


def setup_logging() -> None:
    """Plain messages on standard output, from rank 0 alone."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if is_main_process() else logging.ERROR)


def progress(items: Iterable, description: str, total: int | None = None) -> tqdm:
    """A progress bar over `items`, on rank 0 and on a terminal only."""
    disable = None if is_main_process() else True  # None: where the output is no terminal
    return tqdm(items, desc=description, total=total, disable=disable, leave=False, dynamic_ncols=True)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def choose_device(name: str) -> torch.device:
    """`auto` is the GPU of this process if there is one, else the CPU; any other name is torch's.

    Raises:
        UserError: the device does not exist here.
    """
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device; try --device cpu")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device computes it natively, else fp32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bf16" if native else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return get_rank() == 0


def get_rank() -> int:
    """This process's number in a torchrun job; 0 outside one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def get_world_size() -> int:
    """Number of processes of a torchrun job; 1 outside one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1
