"""The device that a command or a run computes on."""

from __future__ import annotations

import torch

from ..config.train_config import ConfigError


def device_of(name: str) -> torch.device:
    """The device of a name; `ConfigError` if it is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device is 'cuda', but no CUDA device is there; use 'cpu'")
    return torch.device("cpu" if is_on_cpu(name) else "cuda")


def is_on_cpu(name: str) -> bool:
    """Whether a device's name means the CPU here: "cpu", or any name if there is no GPU."""
    return name == "cpu" or not torch.cuda.is_available()


def memory_of(device: torch.device) -> int | None:
    """Bytes of a GPU's memory; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def device_label(device: torch.device) -> str:
    """A device's name for the user: a GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
