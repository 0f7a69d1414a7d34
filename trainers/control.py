"""How a run is asked to pause, stop or sample: `control.json`, Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UserError
from .job import JobFolder

POLL_S = 0.5


class Stopped(UserError):
    """The run ends before its last iteration because it was asked to; it can be resumed."""


class RunError(UserError, RuntimeError):
    """The run cannot go on; its last good checkpoint is intact."""


class Control:
    """What is asked of a run, looked at between iterations and, for signals, while sampling.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: JobFolder) -> None:
        self.folder = folder
        self.job = folder.job()
        self.is_signalled = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Within it the first Ctrl-C or SIGTERM asks for a stop; a second one interrupts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self._signalled) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _signalled(self, *_: Any) -> None:
        if self.is_signalled:
            raise KeyboardInterrupt
        self.is_signalled = True

    def check(self) -> None:
        """While sampling: drop the iteration at a signal; nothing is lost but its images.

        Raises:
            Stopped: after a signal.
        """
        if self.is_signalled:
            raise Stopped("stopped by a signal")

    def between(self, done: int, of: int) -> bool:
        """Between iterations: stop, or wait while paused. `RunError` where the folder changed.

        Args:
            done: finished iterations, for the status.
            of: iterations in all.

        Returns:
            Whether samples were asked for.

        Raises:
            Stopped: where a stop was asked for.
        """
        is_waiting = False
        while True:
            self._check_folder()
            self.check()
            asked = self.folder.asked()
            if asked == "stop":
                self.folder.answered()
                raise Stopped("stopped as asked")
            if asked != "pause":
                if asked is not None:
                    self.folder.answered()
                if is_waiting:
                    self.folder.status("running", iteration=done, of=of)
                return asked == "sample"
            if not is_waiting:
                is_waiting = True
                self.folder.status("paused", iteration=done, of=of)
            time.sleep(POLL_S)

    def _check_folder(self) -> None:
        root = self.folder.root
        if not self.folder.is_used():
            raise RunError(f"the job folder {root} was deleted or moved during the run")
        if self.folder.read("job.json") != self.job:
            raise RunError(
                f"{root / 'job.json'} was edited during the run; undo the edit and resume, or "
                "start a new run with the other config"
            )
