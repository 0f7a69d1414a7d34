"""The sigmas that a flow model was trained with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pcpo.schedules import empirical_shift, resolution_shift
from .errors import ModelError
from .source import read_config


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """A flow model's scheduler config; the defaults are SD3's.

    Attributes:
        shift: towards noise, static; 3 for SD3 and SD3.5.
        is_dynamic: the shift depends on the number of latent tokens, as FLUX's does.
        num_train_timesteps: the network's timestep is sigma times this.
        base_tokens: tokens at which the dynamic shift is exp(base_mu).
        max_tokens: tokens at which it is exp(max_mu).
        base_mu: see there.
        max_mu: see there.
        is_empirical: the shift depends on the number of steps too, as FLUX.2's does.
        patch: latent points along the side of one token.
    """

    shift: float = 3.0
    is_dynamic: bool = False
    num_train_timesteps: int = 1000
    base_tokens: int = 256
    max_tokens: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15
    is_empirical: bool = False
    patch: int = 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """Read a scheduler_config.json; `ModelError` for a shift that no flow model has."""
        shift = float(config.get("shift", 1.0))
        if not (math.isfinite(shift) and shift > 0):
            raise ModelError(f"the model's shift is {shift}; it must be positive")
        return cls(
            shift=shift,
            is_dynamic=bool(config.get("use_dynamic_shifting", False)),
            num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
            base_tokens=int(config.get("base_image_seq_len", 256)),
            max_tokens=int(config.get("max_image_seq_len", 4096)),
            base_mu=float(config.get("base_shift", 0.5)),
            max_mu=float(config.get("max_shift", 1.15)),
        )

    @classmethod
    def of_folder(cls, path: Path) -> FlowSchedule:
        """Read a diffusers folder's scheduler_config.json; `ModelError` as `from_dict`."""
        return cls.from_dict(read_config(path / "scheduler" / "scheduler_config.json"))

    def shift_of(self, num_tokens: int, num_steps: int) -> float:
        """The shift for a latent's number of tokens, and a sampler's number of steps.

        >>> schedules = FlowSchedule(), FlowSchedule(is_dynamic=True)
        >>> [round(schedule.shift_of(1024, 10), 3) for schedule in schedules]
        [3.0, 1.878]
        """
        if self.is_empirical:
            return empirical_shift(num_tokens, num_steps)
        if not self.is_dynamic:
            return self.shift
        return resolution_shift(
            num_tokens,
            base_tokens=self.base_tokens,
            max_tokens=self.max_tokens,
            base_mu=self.base_mu,
            max_mu=self.max_mu,
        )
