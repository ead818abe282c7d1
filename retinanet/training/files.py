"""Files of a run: written completely or not at all, and by one program at a time."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from retinanet.errors import UserError, output_file, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_SECONDS = 10  # how long to wait for a program that is about to end


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[IO[bytes]]:
    """Write to a temporary file, flush it, then rename it to `path`, so that `path` is never a partial file.

    Raises:
        UserError: the disk is full, or the folder cannot be written to; `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "xb") as file:  # x: follows no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # If a write fails, torch raises an error of its own about the incomplete file; the reason is in its context.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be saved ({reason}); an earlier file, if any, is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def lock_folder(folder: Path) -> IO[str]:
    """Lock `folder` against other runs until the returned file is closed or this program ends.

    Raises:
        UserError: another program holds the lock; the message names it.
    """
    file = open(output_file(folder / "run.lock"), "a+")  # noqa: SIM115, open until the end
    deadline = time.monotonic() + LOCK_SECONDS
    while fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read(200)
                raise UserError(f"{folder}: {owner} is writing here; end it, or choose another --out_dir") from error
            time.sleep(1)
        except OSError:  # a file system without locks
            break
    with contextlib.suppress(OSError):  # a full disk
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    for left in folder.glob("*.*-*.tmp"):  # left behind by a program that was killed
        left.unlink(missing_ok=True)
    return file


def make_out_dir(path: str) -> Path:
    """Create the folder for a command's files; a UserError if it cannot be created."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise UserError(f"--out_dir {shown(path)[1:-1]}: {getattr(error, 'strerror', error)}") from error
    return folder
