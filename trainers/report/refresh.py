"""The report of a run: rewritten now and then beside the work, and always in the end."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ..config.train_config import TrainConfig
from ..job.folder import JobFolder, Onlooker
from ..job.metrics import Digest
from . import curves
from .images import before_after
from .page import MAX_LINES, reward_before, write_page

SHARE = 0.05
"""Largest share of a run's time that goes into its report, except for the last one."""


class Reporter:
    """Writes `report/`: `report.html`, `curves.png` and `before_after.png`, from the run's files.

    Args:
        folder: of the run; an onlooker's is left alone.
    """

    def __init__(self, folder: JobFolder, config: TrainConfig) -> None:
        method = config.method
        self.folder = folder
        self.title = f"{method.credit} credit, {method.objective}, lr {config.optimizer.lr:g}"
        self._digest = Digest(folder.metrics_file, MAX_LINES)
        self._due = time.monotonic()
        self._beside = ThreadPoolExecutor(1, "report")
        self._begun: Future[None] | None = None

    def update(self) -> None:
        """Begin to write the report, and do not wait for it.

        Nothing is begun while one is being written, or was just written, measured by how long it
        took; `OSError` if the last one could not be.
        """
        if self._begun is not None and self._begun.done():
            done, self._begun = self._begun, None
            done.result()
        if self._begun is None and time.monotonic() >= self._due:
            self._begun = self._beside.submit(self._write)

    def write(self) -> None:
        """Write the report as it is now, after one that was begun."""
        if self._begun is not None:
            wait([self._begun])
            self._begun = None
        self._write()

    def _write(self) -> None:
        if isinstance(self.folder, Onlooker):
            return
        started = time.monotonic()
        lines = self._digest.update().curves.lines
        if lines:
            before = reward_before(self.folder)
            curves.plot_run(lines, before, self.folder.report / "curves.png", self.title)
        before_after(self.folder)
        write_page(self.folder, self._digest)
        now = time.monotonic()
        self._due = now + (now - started) / SHARE
