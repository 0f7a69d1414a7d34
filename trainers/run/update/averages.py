"""Exponential moving averages (EMA) of the trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...distributed.sharding import local


@dataclass(slots=True)
class Averages:
    """The averages of a run's parameters.

    Before the first averaging they are the untrained weights, a LoRA that does nothing; until then
    the trained weights are exported as they are.

    Attributes:
        weights: one per parameter.
        count: how often they were averaged.
    """

    weights: list[Tensor]
    count: int = 0

    def add(self, parameters: Sequence[Tensor], decay: float) -> None:
        """Average once more; `decay` is the share of the old averages that stays."""
        now = [local(parameter) for parameter in parameters]
        torch._foreach_lerp_([local(mean) for mean in self.weights], now, 1 - decay)
        self.count += 1
