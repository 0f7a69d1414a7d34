"""The trainable steps of a trajectory that an iteration trains.

Each image's selection comes from its own generator, so it does not depend on how images are
batched or spread over processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .rollout import generator_for


@dataclass(frozen=True, slots=True)
class AllSteps:
    """Every step, in the sampler's order."""

    stochastic_window: ClassVar[bool] = False

    def __call__(self, num_steps: int, generator: torch.Generator) -> Int[Tensor, " j"]:
        """Positions among the trainable steps, ascending."""
        return torch.arange(num_steps)


@dataclass(frozen=True, slots=True)
class RandomFraction:
    """A random part of the steps, chosen anew for every image (DanceGRPO on FLUX: 0.6).

    Attributes:
        fraction: part of the steps, rounded down but at least one, in (0, 1].
    """

    stochastic_window: ClassVar[bool] = False
    fraction: float = 0.6

    def __call__(self, num_steps: int, generator: torch.Generator) -> Int[Tensor, " j"]:
        """Positions among the trainable steps, in random order."""
        count = max(1, int(num_steps * self.fraction))
        return torch.randperm(num_steps, generator=generator)[:count]


@dataclass(frozen=True, slots=True)
class SlidingWindow:
    """A window of steps, which moves from noise to image and back to the start (MixGRPO).

    Only the window's steps carry noise; the others are sampled deterministically.

    Attributes:
        size: steps in the window, >= 1.
        stride: steps per move, >= 1.
        every: iterations it stays in one place, >= 1.
        move: "sliding", "random" (any place, each as likely) or "fixed".
        start: first step of a fixed window, >= 0; a window never reaches beyond the last step.
        seed: of the random places.
    """

    stochastic_window: ClassVar[bool] = True
    size: int = 4
    stride: int = 1
    every: int = 25
    move: Literal["sliding", "random", "fixed"] = "sliding"
    start: int = 0
    seed: int = 0

    def inside(self, trained: Bool[Tensor, " n"], iteration: int) -> Bool[Tensor, " n"]:
        """The window of an iteration, as a mask over all steps of the plan.

        Args:
            trained: the steps of the objective.
            iteration: counted from 0.

        Returns:
            The mask; a sliding window keeps its size at the end and then rolls back to the start.
        """
        steps = trained.nonzero().flatten()
        size = min(self.size, len(steps))
        last, turn, start = len(steps) - size, iteration // self.every, self.start
        if self.move == "random":
            generator = generator_for(self.seed, "window", turn)
            start = int(torch.randint(last + 1, (), generator=generator))
        elif self.move == "sliding":
            start = turn % (-(-last // self.stride) + 1) * self.stride
        start = min(start, last)
        mask = torch.zeros_like(trained)
        mask[steps[start : start + size]] = True
        return mask

    def __call__(self, num_steps: int, generator: torch.Generator) -> Int[Tensor, " j"]:
        """Positions among the kept steps: all, since only the window's are kept."""
        return torch.arange(num_steps)
