"""Rewards: from finished images and their prompts to one number per image.

Images are 8-bit RGB, shape (b, 3, h, w), because every published reward is computed after the
rounding that a saved file would have. One file per reward; `REWARDS` names them (`registry.py`),
and nothing is imported before it is asked for.
"""

from __future__ import annotations

from inspect import signature
from sys import float_info
from typing import Any

from ...registry import REWARDS
from ..errors import RewardUnavailable
from ..pictures.tensors import Images, Pictures
from ..scores import Reward, Scores
from .base import BatchReward
from .combine import WeightedSum

__all__ = [
    "REWARDS",
    "BatchReward",
    "Images",
    "Pictures",
    "Reward",
    "RewardUnavailable",
    "Scores",
    "WeightedSum",
    "load_reward",
    "reward_class",
]


def reward_class(name: str) -> type[Any]:
    """The class of the reward called `name`, a key of `REWARDS`.

    Returns:
        A `BatchReward`, whose constructor's arguments are the reward's options.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; choose one of {', '.join(sorted(REWARDS))}")
    return REWARDS[name]


def load_reward(name: str, **options: Any) -> Reward:
    """Make the reward called `name`; its networks are loaded when it first has to score.

    Args:
        name: a key of `REWARDS`.
        options: keyword arguments of its class.

    Raises:
        ValueError: for an unknown name or option, or a number that is not finite.
    """
    made_by = reward_class(name)
    known = tuple(signature(made_by).parameters)
    for option, value in options.items():
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the reward {name!r} has no option {option!r}; {there}")
        if not _is_finite(value):
            raise ValueError(
                f"the option {option!r} of the reward {name!r} is {value!r:.40}, which is not "
                "finite; give another number"
            )
    return made_by(**options)


def _is_finite(value: Any) -> bool:
    """Whether every number in a value fits a float."""
    if isinstance(value, list | tuple | dict):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, int | float) or abs(value) <= float_info.max
