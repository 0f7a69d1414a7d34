"""Ask a run to pause, stop or sample: `control.json`, Ctrl-C and SIGTERM, ComfyUI."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..distributed.launcher import is_one_of_several, is_orphan
from ..errors import RunError, Stopped
from ..job.comfyui import Server
from ..job.folder import JobFolder, Onlooker
from .endings import check_there

POLL_S = 0.5
HEARTBEAT_S = 10.0


class Control:
    """Requests to a run, read between iterations and, if it is to stop at once, within them.

    Args:
        server: the folder of ComfyUI's jobs, if it was started from there.
        decide: runs a function in every process of the run; the first one's result counts.
    """

    def __init__(
        self,
        folder: JobFolder,
        server: Path | None = None,
        decide: Callable[[Callable[[], Any]], Any] = lambda work: work(),
    ) -> None:
        self.folder = folder
        self.decide = decide
        self.is_first = not isinstance(folder, Onlooker)
        self.job = folder.job() if self.is_first else {}
        self.server = server and Server(server, self.job.get("settings", {}))
        self.is_signalled = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Take the first Ctrl-C or SIGTERM within it as a request to stop; a second one interrupts.

        One of several processes does the same, so that it can still report how the run ended when
        it is ended together with another.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.signal(kind, self._on_signal) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items() if not is_one_of_several() else ():
                signal.signal(kind, handler)

    def _on_signal(self, *_: Any) -> None:
        if self.is_signalled:
            raise KeyboardInterrupt
        self.is_signalled = True

    def check(self) -> None:
        """While sampling, drop the iteration at a signal; only its images are lost.

        Raises:
            Stopped: after a signal, or if ComfyUI ended and the run is to end with it.
        """
        if self.is_signalled:
            raise Stopped("stopped by a signal")
        if is_orphan():
            raise Stopped("stopped, because the command that started the processes has ended")
        if self.server is not None and self.server.is_gone():
            raise Stopped("saved and stopped, as set, because ComfyUI ended")

    def stop_now(self, number: int | None = None) -> None:
        """Drop the open iteration if that is asked for; it is repeated later.

        Several processes stop together after it, and so does a run for which going back to its last
        checkpoint would cost finished iterations.

        `Stopped` then, midway if weights may have changed.

        Args:
            number: of the iteration, counted from 0, if it may have changed weights.
        """
        if not self.is_first or is_one_of_several() or self.folder.request() != "stop_now":
            return
        if number and not (self.folder.checkpoints / f"{number:05}").is_dir():
            return
        self.folder.clear_request()
        stopped = Stopped("stopped as asked")
        stopped.is_midway = number is not None
        raise stopped

    def between(
        self,
        done: int,
        of: int,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        """Stop (`Stopped`) or wait while paused; returns whether samples were asked for.

        `RunError` if the folder changed.

        Args:
            done: finished iterations, for the status.
            paused: makes a context that is entered while it waits.
        """
        asked, why = self.decide(self._look)
        if why is not None:
            with paused():
                asked = self._wait(done, of)
            self.folder.status("running", iteration=done, of=of)
        if asked is not None:
            self.folder.clear_request()
        return asked == "sample"

    def _look(self) -> tuple[str | None, dict[str, str] | None]:
        """The request, and the status fields of a pause if there is a reason for one."""
        if not self.is_first:
            self.check()
            return None, None
        self._check_folder()
        self.check()
        asked = self.folder.request()
        if asked in ("stop", "stop_now"):
            self.folder.clear_request()
            raise Stopped("stopped as asked")
        if asked == "pause":
            return asked, {}
        if self.server is not None and self.server.is_busy():
            return asked, {"message": "waiting for ComfyUI's queue"}
        return asked, None

    def _wait(self, done: int, of: int) -> str | None:
        """Wait until nothing is in the way, and return the request."""
        said, beaten = None, 0.0
        while True:
            asked, why = self.decide(self._look)
            if why is None:
                return asked
            now = time.monotonic()
            if why != said or now - beaten >= HEARTBEAT_S:
                said, beaten = why, now
                self.folder.status("paused", iteration=done, of=of, **why)
            time.sleep(POLL_S)

    def _check_folder(self) -> None:
        root = self.folder.root
        check_there(self.folder)
        if self.folder.read("job.json") != self.job:
            raise RunError(
                f"{root / 'job.json'} was edited during the run; undo the edit and resume, or "
                "start a new run with the other config"
            )
