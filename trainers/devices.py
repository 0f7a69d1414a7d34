"""The device that a command computes on."""

from __future__ import annotations

import torch

from .config import ConfigError


def device_of(name: str) -> torch.device:
    """The device of a name.

    Raises:
        ConfigError: where it is not there.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("the device is 'cuda', but no CUDA device is there; use 'cpu'")
    is_cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if is_cuda else "cpu")
