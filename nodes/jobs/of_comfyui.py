"""The jobs of this ComfyUI: its one registry, and what of it whoever asks may see."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import access
from .access import Jobs, UserJobs, current_user, is_shared
from .registry import JobRegistry

_registries: list[JobRegistry] = []
_making = threading.Lock()


def every_job() -> JobRegistry:
    """The registry of this ComfyUI, made at the first call."""
    with _making:
        if not _registries:
            _registries.append(JobRegistry(**comfyui()))
        return _registries[0]


def registry() -> Jobs:
    """The jobs that the current user may see and change."""
    return UserJobs(every_job(), current_user()) if is_shared() else every_job()


def comfyui() -> dict[str, Any]:
    """What a job registry needs from this ComfyUI, as keyword arguments."""
    import folder_paths

    root = Path(folder_paths.get_system_user_directory("pcpo")) / "jobs"
    server = access.server()
    if server is None:
        return {"root": root}

    def notify(jobs: list[dict[str, Any]]) -> None:
        said = {"jobs": jobs, "at": every_job().stamp()}
        if access.is_shared():  # all connections get it: each page asks for what it may see
            said = {"jobs": None}
        with suppress(RuntimeError):  # its loop has ended, and with it all that listen
            server.send_sync("pcpo.jobs", said)

    def is_busy() -> bool:
        return server.prompt_queue.get_tasks_remaining() > 0

    return {"root": root, "notify": notify, "is_busy": is_busy}
