"""The largest numbers that settings and options take, each with its reason.

A larger number is a typing error, or would fail in the middle of a run: out of memory, out of
range, or after years.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

SEED = 2**64 - 1
"""Largest seed of torch's generators and ComfyUI's seed widgets."""
STEPS = 1000
"""Timesteps of a diffusion model, and of flow models' schedules."""
SIDE = 8192
"""Pixels of a side: one decoded image then has 800 MB in float32."""
ITERATIONS = 1_000_000
"""Of a run, and of anything counted in iterations: years of work, a gigabyte of numbers."""
UPDATES = 10_000_000
"""Of a run, and of anything counted in updates."""
PROMPTS = 10_000
"""Of an iteration or an evaluation; the paper has 576."""
GROUP = 1024
"""Images of one prompt."""
IMAGES = 100_000
"""Of an iteration or a command: 50 steps of SD1.5 keep 3 MB for each."""
BATCH = 4096
"""Images per forward pass."""
RANK = 1024
"""Of adapters; the layers hardly have more rows."""
PROCESSES = 1024
"""On one machine, and concurrent runs."""
GUIDANCE = 100.0
"""ComfyUI's own limit of guidance scales, and of shifts."""
NOISE = 10.0
"""Multiple of the noise that keeps the marginals."""
LARGE = 1e6
"""For numbers without a limit of their own: float32 keeps one decimal there."""
NORM = 1e12
"""A gradient norm that is never reached, to switch clipping off."""

Seed = Annotated[int, Field(ge=0, le=SEED)]
Steps = Annotated[int, Field(ge=1, le=STEPS)]
Iterations = Annotated[int, Field(ge=1, le=ITERATIONS)]
Updates = Annotated[int, Field(ge=1, le=UPDATES)]
Prompts = Annotated[int, Field(ge=1, le=PROMPTS)]
Group = Annotated[int, Field(ge=1, le=GROUP)]
Images = Annotated[int, Field(ge=1, le=IMAGES)]
Batch = Annotated[int, Field(ge=1, le=BATCH)]
Rank = Annotated[int, Field(ge=1, le=RANK)]
Guidance = Annotated[float, Field(ge=0, le=GUIDANCE)]
Positive = Annotated[float, Field(gt=0, le=LARGE)]
Amount = Annotated[float, Field(ge=0, le=LARGE)]
Weight = Annotated[float, Field(ge=-LARGE, le=LARGE)]
Share = Annotated[float, Field(ge=0, le=1)]
Processes = Annotated[int | None, Field(ge=1, le=PROCESSES)]
