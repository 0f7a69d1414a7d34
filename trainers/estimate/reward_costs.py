"""Costs of rewards' networks, by their published architectures. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
AT_ONCE = 16  # images


@dataclass(frozen=True, slots=True)
class RewardCost:
    """The cost of a reward's networks.

    Attributes:
        weights: their number.
        work: operations for an image and its prompt.
        live: numbers alive at the worst moment, of one image.
    """

    weights: float
    work: float
    live: float


_CLIP_L = RewardCost(428e6, 175e9, 257 * 1024 * 12)
_CLIP_H = RewardCost(986e6, 382e9, 257 * 1280 * 12)
COSTS = {
    "aesthetic": RewardCost(304e6, 162e9, _CLIP_L.live),
    "clip_score": _CLIP_L,
    "hps_v2": _CLIP_H,
    "hps_v2_1": _CLIP_H,
    "image_reward": RewardCost(446e6, 137e9, 197 * 1024 * 12),
    "pick_score": _CLIP_H,
    "vlm_bert_score": RewardCost(650e6, 60e9, 2 * 512 * 1024 * 12),
}
"""By name; every other reward has no network that counts, or is on another machine."""
ELSEWHERE = ("remote", "vlm_judge", "vlm_bert_score")
"""Rewards that a server computes."""


def reward_costs(rewards: Mapping[str, Any]) -> tuple[float, float, float]:
    """The costs of a run's rewards together.

    Args:
        rewards: the config's section, in its short form or its long one.

    Returns:
        Bytes of weights, bytes alive while one scores, operations per image.
    """
    weights = live = work = 0.0
    for label, part in rewards.items():
        table = part if isinstance(part, Mapping) else {}
        cost = COSTS.get(str(table.get("name") or label))
        if cost is None:
            continue
        each = BYTES.get(str(dict(table.get("options") or {}).get("dtype")), 4)
        weights += each * cost.weights
        live = max(live, each * cost.live * AT_ONCE)
        work += cost.work
    return weights, live, work
