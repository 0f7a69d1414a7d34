"""TensorBoard events of a run, where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from .config import ConfigError, TrainConfig
from .job import JobFolder


class Tracker:
    """Writes each iteration's numbers as TensorBoard scalars.

    Args:
        writer: a `SummaryWriter`, or None to write nothing.
    """

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    @classmethod
    def of(cls, config: TrainConfig, folder: JobFolder, iteration: int) -> Tracker:
        """The tracker of a run that goes on after an iteration; later events are replaced."""
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
        """Finish the file."""
        if self.writer is not None:
            self.writer.close()


def check_tensorboard(config: TrainConfig) -> None:
    """Refuse a run that wants TensorBoard where it is not installed.

    Raises:
        ConfigError: saying how to install it.
    """
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "run.tensorboard is true, but tensorboard is not installed; `pip install "
            "comfyui-pcpo[tensorboard]`, or set it to false"
        )
