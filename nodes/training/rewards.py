"""A job's rewards: which ones, with their options, weights and scales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...pcpo.rewards import Reward, WeightedSum
from ...pcpo.rewards.combine import Affine, Scale
from ...pcpo.rewards.taste import Taste
from ...registry import REWARDS
from ..errors import NodeError
from ..rewards.make import NamedReward, remake
from ..rewards.sum import parts_of


@dataclass(frozen=True, slots=True)
class Judge:
    """One of the rewards of a job.

    Attributes:
        scale: its normalisation, if it has one.
    """

    reward: NamedReward
    weight: float
    scale: Scale

    @property
    def normalise(self) -> dict[str, Any]:
        """The scale as the config has it; empty where there is none."""
        if not isinstance(self.scale, Affine):
            return {"normalise": self.scale.name}
        if self.scale == Affine():
            return {}
        return {"normalise": "affine", "scale": self.scale.scale, "shift": self.scale.shift}


def judges_of(reward: Any) -> list[Judge]:
    """The rewards that a job trains on.

    Returns:
        Its parts; one that occurs twice in the same way has the sum of its weights.
    """
    found: dict[tuple[str, ...], Judge] = {}
    for part, weight, scale in parts_of(reward):
        if isinstance(part, WeightedSum):
            raise NodeError(_scaled_sum(part))
        if not isinstance(part, NamedReward) or part.name not in REWARDS:
            name = getattr(part, "name", type(part).__name__)
            known = ", ".join(REWARDS)
            raise NodeError(f"the reward {name!r} cannot be trained on here; choose one of {known}")
        judge = Judge(part, weight, scale)
        key = (part.name, part.options, json.dumps(judge.normalise))
        before = found[key].weight if key in found else 0.0
        found[key] = Judge(part, before + weight, scale)
    return list(found.values())


def watched_of(reward: Any) -> Judge:
    """The reward that a job's guard checks."""
    parts = judges_of(reward)
    if len(parts) != 1 or (parts[0].weight, parts[0].scale) != (1.0, Affine()):
        raise NodeError(
            "guard_reward must be one reward in its own units; connect PCPO Reward directly"
        )
    return parts[0]


def guard_of(watched: Sequence[Judge]) -> dict[str, Any]:
    """The guard's reward, as fields of the config's section `guard`."""
    found: dict[str, Any] = {}
    for judge in watched:
        options = json.loads(judge.reward.options)
        pairs = [f"{name}={json.dumps(value)}" for name, value in options.items()]
        found = {"reward": judge.reward.name, "reward_options": pairs}
    return found


def _scaled_sum(reward: WeightedSum) -> str:
    """Why a scale over a sum is refused: only each reward of a job has one."""
    names = ", ".join(repr(part.name) for part in _name_of(reward))
    return (
        f"PCPO Normalise Reward is behind PCPO Combine Rewards or another PCPO Normalise Reward "
        f"({names}), which scores but cannot be trained on; put it right behind PCPO Reward, and "
        "combine afterwards"
    )


def _name_of(reward: Reward) -> list[Reward]:
    if isinstance(reward, WeightedSum):
        return [found for part in reward.rewards for found in _name_of(part)]
    return [reward]


def check_rewards(judges: Sequence[Judge]) -> None:
    """Refuse a reward that is no longer available: its node may have run long ago."""
    for judge in judges:
        remake(judge.reward.name, judge.reward.options)


def doubts_of(judges: Sequence[Judge]) -> list[str]:
    """Why tastes among the rewards are not to be relied on yet, one sentence each."""
    tastes = [judge.reward.made for judge in judges if isinstance(judge.reward.made, Taste)]
    return [taste.fitted.doubt for taste in tastes if taste.fitted.doubt]


def section_of(judges: Sequence[Judge]) -> dict[str, float | dict[str, Any]]:
    """The config's section `rewards`.

    Returns:
        By label (the reward's name, with a number from the second one on) a weight, or more.
    """
    found: dict[str, float | dict[str, Any]] = {}
    for judge in judges:
        name, number = judge.reward.name, 1
        while (label := name if number == 1 else f"{name}_{number}") in found:
            number += 1
        options = json.loads(judge.reward.options)
        more = judge.normalise | ({"options": options} if options else {})
        if label != name:
            more["name"] = name
        found[label] = {"weight": judge.weight, **more} if more else judge.weight
    return found
