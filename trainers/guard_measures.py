"""What a run's guard measures besides the reward that is trained: another one, and diversity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..pcpo.metrics.lpips import Lpips
from ..pcpo.metrics.similarity import DIVERSITIES
from ..pcpo.rewards import RewardUnavailable
from ..pcpo.rewards.base import lent
from .config import ConfigError, GuardConfig, RewardConfig
from .judges import Judges


@dataclass(slots=True)
class Measures:
    """The guard's instruments.

    Attributes:
        diversity: of the images of one prompt.
        second: the second reward, None where there is none.
        lpips: whose diversity it is, where it is LPIPS'.
        device: where LPIPS' network looks at images; where it is, where None.
    """

    diversity: Callable[[Tensor], float]
    second: Judges | None = None
    lpips: Lpips | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, config: GuardConfig) -> Measures | None:
        """Make a guard's instruments; networks are not loaded yet.

        Args:
            config: of the guard.

        Returns:
            They, None where there is no guard.

        Raises:
            ConfigError: where a reward or weights cannot be had.
        """
        if config.every == 0:
            return None
        second = None
        if config.reward is not None:
            part = RewardConfig(name=config.reward, options=config.options)
            second = Judges.made({config.reward: part}, "guard.reward ")
        if config.diversity in DIVERSITIES:
            return cls(DIVERSITIES[config.diversity], second)
        try:
            lpips = Lpips()
        except RewardUnavailable as error:
            raise ConfigError(f"guard.diversity is {config.diversity!r}: {error}") from error
        return cls(lpips.diversity, second, lpips)

    def place(self, device: torch.device, *, is_lent: bool) -> None:
        """Load the networks and put them on the device, or have it lent to them.

        Args:
            device: that trains.
            is_lent: whether the second reward's wait in main memory; LPIPS' always do.

        Raises:
            ConfigError: where weights cannot be read.
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
        """What the second reward's numbers depend on."""
        found = {} if self.second is None else self.second.fingerprints()
        return {f"{label} (guard)": parts for label, parts in found.items()}

    def spread(self, groups: Sequence[Tensor]) -> float:
        """The mean diversity.

        Args:
            groups: the images of each prompt, (k, 3, h, w) 8-bit.

        Returns:
            The mean over prompts.
        """
        if self.lpips is None or self.device is None:
            return sum(map(self.diversity, groups)) / len(groups)
        with lent(self.lpips.modules(), self.device):
            return sum(map(self.diversity, groups)) / len(groups)
