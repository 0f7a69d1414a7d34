"""Exponential moving averages of what is trained (EMA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sharding import local


@dataclass(slots=True)
class Averages:
    """The averages of a run's parameters.

    Before the first averaging they are the untrained weights, a LoRA that does nothing; until then
    what was trained is exported as it is.

    Attributes:
        weights: one a parameter.
        count: how often they were averaged.
    """

    weights: list[Tensor]
    count: int = 0

    def add(self, parameters: Sequence[Tensor], decay: float) -> None:
        """Average once more.

        Args:
            parameters: as they are now.
            decay: the share of the old averages that stays.
        """
        now = [local(parameter) for parameter in parameters]
        torch._foreach_lerp_([local(mean) for mean in self.weights], now, 1 - decay)
        self.count += 1
