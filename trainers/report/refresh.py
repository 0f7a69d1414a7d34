"""The report of a run in progress: rewritten now and then, and always in the end."""

from __future__ import annotations

import time

from ..config.train_config import TrainConfig
from ..job.folder import JobFolder, Onlooker
from ..job.metrics import Digest
from . import curves
from .page import MAX_LINES, reward_before, write_page

SHARE = 0.05
"""Largest share of a run's time that goes into its report, except for the last one."""


class Reporter:
    """Writes `report/report.html` and `report/curves.png`.

    Args:
        folder: of the run; an onlooker's is left alone.
        config: of the run.
    """

    def __init__(self, folder: JobFolder, config: TrainConfig) -> None:
        method = config.method
        self.folder = folder
        self.title = f"{method.credit} credit, {method.objective}, lr {config.optimizer.lr:g}"
        self._digest = Digest(folder.metrics_file, MAX_LINES)
        self._due = time.monotonic()

    def update(self) -> None:
        """Write the report unless that was just done, measured by how long it takes."""
        if time.monotonic() >= self._due:
            self.write()

    def write(self) -> None:
        if isinstance(self.folder, Onlooker):
            return
        started = time.monotonic()
        lines = self._digest.update().curves.lines
        if lines:
            before = reward_before(self.folder)
            curves.plot_run(lines, before, self.folder.report / "curves.png", self.title)
        write_page(self.folder, self._digest)
        now = time.monotonic()
        self._due = now + (now - started) / SHARE
