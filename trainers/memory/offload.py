"""Modules that are on the device only while they are used: the autoencoder and the rewards'."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ...pcpo.rewards import Pictures, Reward, Scores
from ...pcpo.rewards.base import on_device
from .blocks import swap_blocks
from .trajectory_store import is_small


def is_offloaded(choice: str, device: torch.device) -> bool:
    """Whether parts wait in main memory, by `model.offload` and the training device.

    True on a small card, or if it is asked for; False on a CPU, where nothing is gained.
    """
    is_wanted = choice in ("always", "blocks") or (choice == "auto" and is_small(device))
    return device.type != "cpu" and is_wanted


def place(family: Any, device: torch.device, choice: str, *, is_split: bool = False) -> None:
    """Put a model, its text encoders gone, on its device, as `model.offload` says.

    If `is_split`, the network is there already, split over processes.
    """
    if choice == "blocks":
        swap_blocks(family.network, device)
    if not is_split:
        nn.Module.to(family.network, device=device)
    if not is_offloaded(choice, device):
        nn.Module.to(family.vae, device=device)


def decoding(
    family: Any, device: torch.device, *, is_lent: bool
) -> Callable[[], AbstractContextManager]:
    """A factory of the context that images are decoded in."""
    return partial(on_device, [family.vae], device) if is_lent else nullcontext


class LentReward:
    """A reward whose networks are on the device only while it scores."""

    def __init__(self, reward: Reward, device: torch.device) -> None:
        self.reward, self.device = reward, device
        self.name, self.needs_prompt = reward.name, reward.needs_prompt
        self.bounds, self.is_elsewhere = reward.bounds, False
        self.complaints, self.fingerprint = reward.complaints, reward.fingerprint

    def modules(self) -> list[nn.Module]:
        """No networks: none has to leave the device."""
        return []

    def score(self, images: Pictures, prompts: Sequence[str]) -> Scores:
        with on_device(self.reward.modules(), self.device):
            return self.reward.score(images, prompts)


def place_reward(reward: Reward, device: torch.device, *, is_lent: bool) -> Reward:
    """A reward that scores on a device.

    Its networks are loaded in main memory; if `is_lent`, they stay there between its scores.
    """
    if not reward.modules():
        return reward
    if is_lent:
        return LentReward(reward, device)
    for module in reward.modules():
        module.to(device)
    return reward
