"""The pack's own kinds of sockets."""

from __future__ import annotations

from comfy_api.latest import io

Trajectory = io.Custom("PCPO_TRAJECTORY")
Reward = io.Custom("PCPO_REWARD")


SEEDS = 2**64
"""After the largest seed comes 0."""


def seed_input(tooltip: str) -> io.Int.Input:
    """The widget of a seed."""
    return io.Int.Input(
        "seed", default=0, min=0, max=SEEDS - 1, control_after_generate=True, tooltip=tooltip
    )
