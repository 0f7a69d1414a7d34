"""Temporary files: their names, and those of dead processes. Standard library only.

.NAME.pcpo-MACHINE-PROCESS.tmp is written before it takes NAME's place; a process that is killed
leaves it behind. MACHINE distinguishes containers and hosts that share a folder, for each has its
own process numbers.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

NAME = re.compile(r"\.(.+)\.(?:pcpo-([0-9a-f]{8})-)?([0-9]+)\.tmp")
EARLIER = re.compile(
    r"(job|status|control|published|guard|scores)\.json|metrics\.jsonl|report\.html|"
    r"pcpo_[0-9]+\.safetensors|[0-9]{5,}"
)
"""Names that earlier versions wrote into a job folder, by .NAME.PROCESS.tmp."""
OLD_S = 86400.0
"""Age at which a file of another machine counts as left behind; its writer would have touched it.
"""
STARTED = time.time()


def temporary(path: Path) -> Path:
    """The file that this process writes before it takes the place of `path`."""
    return path.with_name(f".{path.name}.pcpo-{machine()}-{os.getpid()}.tmp")


@cache
def machine() -> str:
    """Identifies a set of process numbers: the host, and on Linux the namespace."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{zlib.crc32(f'{platform.node()} {space}'.encode()):08x}"


def sweep(folder: Path, own: str = "", *, is_deep: bool = True) -> None:
    """Remove temporary files whose processes are gone; those of other programs stay.

    Args:
        own: another name that earlier versions wrote, whose files do not say that they are PCPO's.
        is_deep: whether to search the folders in it, too.
    """
    for file in _temporary_files(folder, is_deep=is_deep):
        name, where, process = NAME.fullmatch(file.name).groups()  # pyright: ignore[reportOptionalMemberAccess]
        is_ours = where or name == own or EARLIER.fullmatch(name)
        if is_ours and _is_left(file, where, int(process)):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file, ignore_errors=True)
            else:
                with suppress(OSError):
                    file.unlink()


def _temporary_files(folder: Path, *, is_deep: bool) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            if NAME.fullmatch(name):
                yield Path(place, name)
        folders[:] = [name for name in folders if is_deep and not NAME.fullmatch(name)]


def _is_left(file: Path, where: str | None, process: int) -> bool:
    try:
        touched = file.stat().st_mtime
    except OSError:
        return False
    if where not in (None, machine()):
        return time.time() - touched > OLD_S
    if process == os.getpid():  # a number that an earlier process had
        return touched < STARTED - 1
    return not is_running(process)


def is_running(process: int) -> bool:
    if os.name == "nt":
        return _is_running_on_windows(process)
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _is_running_on_windows(process: int) -> bool:
    import ctypes

    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # pyright: ignore[reportAttributeAccessIssue]
    handle = kernel.OpenProcess(0x1000, False, process)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return ctypes.get_last_error() == 5  # pyright: ignore[reportAttributeAccessIssue] (access denied)
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == 259  # STILL_ACTIVE
