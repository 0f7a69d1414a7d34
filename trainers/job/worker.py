"""Start a worker: a separate process, which outlives the one that started it.

No torch: ComfyUI's process imports this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SERVER_LOCK = "server.lock"
"""Beside the jobs; held by the ComfyUI that manages them, for as long as it lives."""
BUSY_LOCK = "busy.lock"
"""Likewise; held while ComfyUI's queue has work."""
STDERR = "stderr.log"
"""In a job's folder: output of its last process that is in no other file."""

DROPPED = ("PYTHONPATH", "PYTHONSTARTUP", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
DROPPED_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "MASTER_")
ADDED = {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# of CreateProcess; Python has these names on Windows alone
CREATE_NEW_PROCESS_GROUP, CREATE_NO_WINDOW = 0x0000_0200, 0x0800_0000


def start(folder: Path, *, device: str = "cpu") -> subprocess.Popen[bytes]:
    """Start a worker that resumes a job, or begins it if there is no checkpoint.

    `OSError` if it cannot be started.

    Args:
        folder: of the job, beside the locks of the server.
        device: this process's name for it: "cpu", "cuda:0".
    """
    flags = detached_options()
    with (folder / STDERR).open("wb") as stderr:
        return subprocess.Popen(
            command(folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # worker.log has it
            stderr=stderr,
            cwd=folder.parent,
            env=environment(os.environ, device),
            start_new_session=flags["start_new_session"] == 1,
            creationflags=flags["creationflags"],
        )


def command(folder: Path) -> list[str]:
    """The words that start a worker: the pack's own entry by its path."""
    entry = str(Path(__file__).parents[1])
    return [sys.executable, entry, "resume", str(folder), "--server", str(folder.parent)]


def cores() -> int:
    """The cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def detached_options(system: str = os.name) -> dict[str, int]:
    """Arguments of `Popen` that keep Ctrl-C and the end of the terminal away from a process."""
    if system == "nt":
        flags = CREATE_NEW_PROCESS_GROUP | CREATE_NO_WINDOW
        return {"start_new_session": 0, "creationflags": flags}
    return {"start_new_session": 1, "creationflags": 0}


def environment(base: Mapping[str, str], device: str) -> dict[str, str]:
    """The environment of a worker: one process, one device, nothing downloaded.

    `device` is this process's name for it.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in DROPPED and not name.startswith(DROPPED_PREFIXES)
    }
    if sys.flags.no_user_site:  # as portable ComfyUI is started
        kept["PYTHONNOUSERSITE"] = "1"
    return {**kept, **ADDED, **visible(base, device)}


def visible(base: Mapping[str, str], device: str) -> dict[str, str]:
    """Variables that show a worker only one device, which it then calls "cuda:0".

    >>> visible({"CUDA_VISIBLE_DEVICES": "2,3"}, "cuda:1")
    {'CUDA_VISIBLE_DEVICES': '3'}
    >>> visible({}, "cuda:1"), visible({}, "mps")
    ({'CUDA_VISIBLE_DEVICES': '1'}, {})
    """
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return dict.fromkeys(VISIBLE, "-1")  # an empty value is none at all on Windows
    if kind != "cuda":
        return {}
    variables = {}
    for name in VISIBLE:
        shown = [part.strip() for part in base.get(name, "").split(",") if part.strip()]
        if shown or name == VISIBLE[0]:
            index = int(number or 0)
            variables[name] = shown[index] if index < len(shown) else str(index)
    return variables
