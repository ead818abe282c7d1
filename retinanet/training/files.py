"""Files of a run: written whole or not at all, and by one program at a time."""

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

LOCK_SECONDS = 10  # to wait for a program that is about to end


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[IO[bytes]]:
    """Write a file to a name of its own, flush it, then rename it: `path` is never half a file, whoever else writes.

    Raises:
        UserError: the disk is full, or the folder cannot be written to; `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.tmp")
    try:
        with open(temporary, "xb") as file:  # x: through no link
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch reports its own trouble with a file that is cut short; the reason is in the error's context.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"{path}: cannot be saved ({reason}); the file before it, if any, is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def lock_folder(folder: Path) -> IO[str]:
    """Keep other programs from writing a run's files to `folder`, until the result is closed or this program ends.

    Raises:
        UserError: another program does; the message names it.
    """
    file = open(output_file(folder / "run.lock"), "a+")  # noqa: SIM115, open until the end
    for seconds in range(LOCK_SECONDS, -1, -1):
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if not seconds:
                file.seek(0)
                raise UserError(
                    f"{folder}: {file.read(200)} writes here; end it, or choose another --out_dir"
                ) from error
            time.sleep(1)
            continue
        except OSError:  # a file system without locks
            pass
        break
    with contextlib.suppress(OSError):  # a full disk
        os.truncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    for left in folder.glob("*.*-*.tmp"):  # by a program that was killed
        left.unlink(missing_ok=True)
    return file


def make_out_dir(path: str) -> Path:
    """Create the folder for a command's files; a UserError if it cannot be created."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # a name with a zero byte
        raise UserError(f"--out_dir {shown(path)[1:-1]}: {getattr(error, 'strerror', error)}") from error
    return folder
