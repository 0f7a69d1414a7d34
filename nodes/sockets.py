"""The pack's own kinds of sockets."""

from __future__ import annotations

from comfy_api.latest import io

from .sampling.noise import SEEDS

Trajectory = io.Custom("PCPO_TRAJECTORY")
Reward = io.Custom("PCPO_REWARD")


def seed_input(tooltip: str) -> io.Int.Input:
    """The widget of a seed.

    Args:
        tooltip: what the seed is of.
    """
    return io.Int.Input(
        "seed", default=0, min=0, max=SEEDS - 1, control_after_generate=True, tooltip=tooltip
    )
