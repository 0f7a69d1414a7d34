"""What a run's guard measures besides the trained reward: another reward, and diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....pcpo.metrics.lpips import Lpips
from ....pcpo.metrics.similarity import DIVERSITIES
from ....pcpo.rewards import RewardUnavailable
from ....pcpo.rewards.base import on_device
from ...config.sections import GuardConfig
from ...config.train_config import ConfigError, RewardConfig
from ..rewards import RewardSet


@dataclass(slots=True)
class Measures:
    """The guard's instruments.

    Attributes:
        diversity: of the images of one prompt.
        second: the second reward, if there is one.
        lpips: the metric behind `diversity`, if it is LPIPS.
        device: to compute LPIPS on; None leaves its network where it is.
    """

    diversity: Callable[[Tensor], float]
    second: RewardSet | None = None
    lpips: Lpips | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, config: GuardConfig) -> Measures | None:
        """Make a guard's instruments, without loading networks; None if there is no guard.

        Raises:
            ConfigError: if a reward or weights are not available.
        """
        if config.every == 0:
            return None
        second = None
        if config.reward is not None:
            part = RewardConfig(name=config.reward, options=config.options)
            second = RewardSet.from_parts({config.reward: part}, "guard.reward ")
        if config.diversity in DIVERSITIES:
            return cls(DIVERSITIES[config.diversity], second)
        try:
            lpips = Lpips()
        except RewardUnavailable as error:
            raise ConfigError(f"guard.diversity is {config.diversity!r}: {error}") from error
        return cls(lpips.diversity, second, lpips)

    def place(self, device: torch.device, *, is_lent: bool) -> None:
        """Load the networks onto the training device, or have it lent to them.

        If `is_lent`, the second reward's networks wait in main memory; LPIPS' always do.
        `ConfigError` if weights cannot be read.
        """
        self.device = device
        if self.second is not None:
            self.second.place(device, is_lent=is_lent)
        try:
            if self.lpips is not None:
                self.lpips.modules()
        except RewardUnavailable as error:
            raise ConfigError(str(error)) from error

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        fingerprints = {} if self.second is None else self.second.fingerprints()
        return {f"{label} (guard)": parts for label, parts in fingerprints.items()}

    def spread(self, groups: Sequence[Tensor]) -> float:
        """The mean diversity over prompts, of the images (k, 3, h, w), 8-bit, of each."""
        if self.lpips is None or self.device is None:
            return sum(map(self.diversity, groups)) / len(groups)
        with on_device(self.lpips.modules(), self.device):
            return sum(map(self.diversity, groups)) / len(groups)
