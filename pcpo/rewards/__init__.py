"""Rewards: from finished images and their prompts to one number an image.

Images are 8-bit RGB, shape (b, 3, h, w), because every published reward is computed after the
rounding that a saved file would have. One file a reward; `REWARDS` names them, and nothing is
imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

Images = UInt8[Tensor, "b 3 h w"]


@dataclass(frozen=True, slots=True)
class Scores:
    """What a reward says of a batch.

    Attributes:
        values: the reward of each image, float32 on the CPU; NaN where it could not be computed.
        details: named parts of each image's reward, for reports; empty where there are none.
        errors: why an image has no reward, None where it has one.
    """

    values: Float32[Tensor, " b"]
    details: tuple[Mapping[str, float], ...] = ()
    errors: tuple[str | None, ...] = ()


class Reward(Protocol):
    """A reward.

    Attributes:
        name: its key in `REWARDS`.
        needs_prompt: whether the score depends on the prompt.
        bounds: the smallest and largest possible value, infinite where there is none.
    """

    name: str
    needs_prompt: bool
    bounds: tuple[float, float]

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score each image against its own prompt; `len(prompts)` is the batch size."""
        ...


# name -> (module in this package, class)
REWARDS: dict[str, tuple[str, str]] = {
    "jpeg_compressibility": ("jpeg", "JpegCompressibility"),
    "jpeg_incompressibility": ("jpeg", "JpegIncompressibility"),
    "scene": ("scene", "SceneReward"),
}


def load_reward(name: str, **options: Any) -> Reward:
    """Build the reward called `name`.

    Args:
        name: a key of `REWARDS`.
        options: keyword arguments of its class.

    Returns:
        The reward, ready to score.

    Raises:
        ValueError: where there is no reward of that name.
    """
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; choose one of {', '.join(sorted(REWARDS))}")
    module, attribute = REWARDS[name]
    return getattr(import_module(f".{module}", __name__), attribute)(**options)


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A weighted sum of rewards, each scored separately and kept apart in `details`.

    Attributes:
        rewards: the rewards.
        weights: one factor a reward.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    name: str = "weighted_sum"

    @property
    def needs_prompt(self) -> bool:
        """Whether any part's score depends on the prompt."""
        return any(reward.needs_prompt for reward in self.rewards)

    @property
    def bounds(self) -> tuple[float, float]:
        """The sum of the parts' bounds, each in the order its weight's sign gives."""
        pairs = zip(self.rewards, self.weights, strict=True)
        ends = [sorted(w * bound for bound in reward.bounds) for reward, w in pairs]
        return sum(low for low, _ in ends), sum(high for _, high in ends)

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score each image with every reward and add them up."""
        parts = [reward.score(images, prompts) for reward in self.rewards]
        pairs = zip(self.weights, parts, strict=True)
        values = torch.stack([w * part.values for w, part in pairs]).sum(dim=0)
        details = tuple(
            {r.name: p.values[i].item() for r, p in zip(self.rewards, parts, strict=True)}
            for i in range(len(prompts))
        )
        errors = tuple(
            next((part.errors[i] for part in parts if part.errors and part.errors[i]), None)
            for i in range(len(prompts))
        )
        return Scores(values, details, errors)
