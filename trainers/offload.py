"""Modules that are on the device only while they are used: the autoencoder and the rewards'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..pcpo.rewards import Reward, Scores
from .store import is_small


def is_offloaded(choice: str, device: torch.device) -> bool:
    """Whether parts wait in main memory.

    Args:
        choice: `model.offload`: "auto", "never" or "always".
        device: that trains.

    Returns:
        True on a small card, or where it is asked for; False on a CPU, where nothing is gained.
    """
    return device.type != "cpu" and (choice == "always" or (choice == "auto" and is_small(device)))


@contextmanager
def lent(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Within it frozen modules are on a device; then their tensors in main memory are back.

    Args:
        modules: not trained; nothing is copied back.
        device: where to.
    """
    homes = [(tensor, tensor.data) for module in modules for tensor in _tensors(module)]
    for tensor, home in homes:
        tensor.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def place(family: Any, device: torch.device, *, is_lent: bool, is_split: bool = False) -> None:
    """Put a model on its device.

    Args:
        family: the model; its text encoders are gone.
        device: of the network.
        is_lent: leave the autoencoder in main memory.
        is_split: the network is there already, split over processes.
    """
    if not is_split:
        nn.Module.to(family.network, device=device)
    if not is_lent:
        nn.Module.to(family.vae, device=device)


def decoding(
    family: Any, device: torch.device, *, is_lent: bool
) -> Callable[[], AbstractContextManager]:
    """What makes the context that images are decoded in."""
    return partial(lent, [family.vae], device) if is_lent else nullcontext


class LentReward:
    """A reward whose modules are on the device only while it scores.

    Args:
        reward: the reward.
        device: where it scores.
    """

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.reward, self.device = reward, device
        self.name, self.needs_prompt = reward.name, reward.needs_prompt
        self.bounds = reward.bounds

    def score(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """The reward's scores."""
        with lent(modules_of(self.reward), self.device):
            return self.reward.score(images, prompts)


def modules_of(reward: Reward) -> list[nn.Module]:
    """The networks of a reward; none where it computes without one."""
    held = getattr(reward, "__dict__", {}).values()
    return [value for value in held if isinstance(value, nn.Module)]
