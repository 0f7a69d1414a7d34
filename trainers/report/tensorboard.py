"""TensorBoard events of a run, if they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config.train_config import TrainConfig
from ..job.folder import JobFolder


class Tracker:
    """Writes each iteration's numbers as TensorBoard scalars.

    Args:
        writer: a `SummaryWriter`, or None to write nothing.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    @classmethod
    def of(cls, config: TrainConfig, folder: JobFolder, iteration: int) -> Tracker:
        """The tracker of a run that resumes after an iteration; later events are replaced."""
        if not config.run.tensorboard:
            return cls(None)
        from torch.utils.tensorboard import SummaryWriter

        return cls(SummaryWriter(str(folder.root / "tensorboard"), purge_step=iteration + 1))

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl."""
        if self.writer is None:
            return
        for name, value in line.items():
            if isinstance(value, int | float) and name != "iteration":
                self.writer.add_scalar(name, value, line["iteration"])
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
