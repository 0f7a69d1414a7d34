"""The pack's own kinds of sockets."""

from __future__ import annotations

from comfy_api.latest import io

Trajectory = io.Custom("PCPO_TRAJECTORY")
Reward = io.Custom("PCPO_REWARD")
