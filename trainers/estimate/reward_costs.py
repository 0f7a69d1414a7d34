"""Costs of rewards' networks, by their published architectures. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...registry import REWARDS

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
AT_ONCE = 16  # images


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
        cost = REWARDS.entries.get(str(table.get("name") or label))
        if cost is None:
            continue
        each = BYTES.get(str(dict(table.get("options") or {}).get("dtype")), 4)
        weights += each * cost.weights
        live = max(live, each * cost.live * AT_ONCE)
        work += cost.work
    return weights, live, work
