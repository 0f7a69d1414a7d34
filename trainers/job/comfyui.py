"""A worker's view of the ComfyUI that started it: whether it is there, and busy. No torch.

ComfyUI holds lock files beside the jobs; the system releases them however it ends, on Windows too,
so a worker needs no process id and no pipe that would break.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .locks import is_taken
from .worker import BUSY_LOCK, SERVER_LOCK

POLL_S = 2.0


class Server:
    """The ComfyUI that manages a job.

    Args:
        root: the folder of its jobs.
        settings: of the job: "on_server_exit", "continue" or "save_and_stop"; and
            "pause_while_busy".
    """

    def __init__(self, root: Path, settings: Mapping[str, Any]) -> None:
        self.root = root
        self.ends_with_it = settings.get("on_server_exit") == "save_and_stop"
        self.waits_for_it = bool(settings.get("pause_while_busy"))
        self._looked = time.monotonic()
        self._is_gone = False

    def is_gone(self) -> bool:
        """Whether ComfyUI ended and the job is to end with it; checked every two seconds."""
        if self.ends_with_it and not self._is_gone:
            now = time.monotonic()
            if now - self._looked >= POLL_S:
                self._looked = now
                self._is_gone = not is_taken(self.root / SERVER_LOCK)
        return self._is_gone

    def is_busy(self) -> bool:
        """Whether its queue has work that the job is to wait for."""
        return self.waits_for_it and is_taken(self.root / BUSY_LOCK)
