"""Sums of rewards: what combining and normalising nodes make, and what a job can be told of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...pcpo.rewards import Reward, WeightedSum
from ...pcpo.rewards.combine import Affine, Scale, ZScore
from ..errors import NodeError

AFFINE, Z_SCORE = Affine.name, ZScore.name

Part = tuple[Reward, float, Scale]
"""A reward, its weight, and what brings it to a scale before."""


def combine(rewards: Sequence[Reward], weights: Sequence[float]) -> WeightedSum:
    """The weighted sum of rewards; of sums among them the weights are multiplied.

    Returns:
        A sum of rewards that are no plain sums themselves.
    """
    pairs = zip(rewards, weights, strict=True)
    parts = [part for reward, weight in pairs for part in parts_of(reward, weight)]
    is_plain = all(scale == Affine() for _, _, scale in parts)
    return WeightedSum(
        tuple(reward for reward, _, _ in parts),
        tuple(weight for _, weight, _ in parts),
        () if is_plain else tuple(scale for _, _, scale in parts),
    )


def parts_of(reward: Reward, weight: float = 1.0) -> Iterator[Part]:
    """The parts of a reward; one that is no sum is its own.

    Yields:
        Each part. It is a sum itself only where that has been brought to a scale as a whole.
    """
    if not isinstance(reward, WeightedSum):
        yield reward, weight, Affine()
        return
    scales = reward.scales or (Affine(),) * len(reward.rewards)
    for inner, own, scale in zip(reward.rewards, reward.weights, scales, strict=True):
        if scale == Affine():
            yield from parts_of(inner, weight * own)
        else:
            yield inner, weight * own, scale


def normalise(reward: Reward, chosen: dict[str, Any]) -> WeightedSum:
    """A reward that is brought to a scale.

    Args:
        chosen: "normalise", and "scale" and "shift" where that is `AFFINE`.
    """
    if chosen["normalise"] == Z_SCORE:
        return WeightedSum((reward,), (1.0,), (ZScore(),))
    scale, shift = float(chosen["scale"]), float(chosen["shift"])
    if not scale > 0:
        raise NodeError(
            f"scale is {scale:g}, and has to be above 0; make a penalty of a reward by a negative "
            "weight in PCPO Combine Rewards"
        )
    return WeightedSum((reward,), (1.0,), (Affine(scale, shift),))
