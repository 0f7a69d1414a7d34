"""A folder that only one process works in. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import UserError
from .leftovers import sweep


def is_taken(lock: Path) -> bool:
    """Whether a process holds a lock file; the system releases it however the process ends."""
    if not lock.is_file():
        return False
    probe = FileLock(lock)
    try:
        probe.acquire(timeout=0)
    except (Timeout, PermissionError):  # of another user, who may well hold it
        return True
    except OSError:
        return False
    probe.release()
    return False


@contextmanager
def hold(
    folder: Path, name: str, refusal: Callable[[str], UserError], patience_s: float = 0.0
) -> Iterator[None]:
    """Hold a folder for this process, or raise the refusal.

    The system releases it however the process ends. Leftovers of dead processes are removed first.

    Args:
        folder: created if it is missing; removed again if nothing was written into it.
        refusal: the error to raise, from the reason; "" if another process holds the folder.
        patience_s: how long to wait for a process that may only be reading.
    """
    made = [path for path in (folder, *folder.absolute().parents) if not os.path.exists(path)]
    lock, was_there = FileLock(folder / name), (folder / name).exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=patience_s)
    except Timeout as error:
        raise refusal("") from error
    except OSError as error:
        raise refusal(error.strerror or str(error)) from error
    try:
        if was_there:  # else it is somebody's folder in which nothing of ours can be
            sweep(folder)
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [name]:
                (folder / name).unlink()  # on Windows not while it is held
        lock.release()
        with suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()
