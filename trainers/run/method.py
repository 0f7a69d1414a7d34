"""Make the method's objects from a config."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ...pcpo import ClipRange
from ...pcpo.branches import UNBRANCHED, Branches
from ...pcpo.transitions import Transition
from ...registry import ADVANTAGES, CREDITS, OBJECTIVES, SELECTIONS, TRANSITIONS
from ..config.sections import (
    AdvantageConfig,
    MethodConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainableConfig,
)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def transition_of(config: SamplerConfig) -> Transition:
    """The sampler's transition at its noise level."""
    return TRANSITIONS[config.transition](config.noise_level)


def branches_of(config: SamplerConfig) -> Branches:
    """Where images that share their path part; they do not, if each has one child."""
    return Branches(config.branch_at, config.branches) if config.branches > 1 else UNBRANCHED


def credit_of(config: MethodConfig) -> Any:
    """How the advantage is distributed over the steps."""
    given = {"target": config.target_weight, "solve_weight": config.solve_weight}
    return _build(CREDITS[config.credit], given)


def objective_of(config: MethodConfig) -> Any:
    return OBJECTIVES[config.objective](ClipRange(low=config.clip_low, high=config.clip_high))


def selection_of(config: MethodConfig, seed: int) -> Any:
    """Which steps an iteration trains; `seed` is of random windows."""
    window = {"size": config.window, "stride": config.window_stride, "every": config.window_every}
    window |= {"move": config.window_move, "start": config.window_start, "seed": seed}
    return _build(SELECTIONS[config.selection], {"fraction": config.fraction, **window})


def advantage_of(config: AdvantageConfig) -> Any:
    """How rewards become advantages; a fresh object, since one kind has state."""
    return _build(ADVANTAGES[config.kind], dict(config))


def _build(kind: Any, settings: dict[str, Any]) -> Any:
    """An object of a dataclass, which takes those of the settings that are its fields."""
    return kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})


def learning_rate(config: OptimizerConfig, done: int) -> float:
    """The learning rate of the update after `done` others: it rises linearly, then stays.

    Adam's first steps are as large as its later ones, but rest on one gradient each; a rise over
    about 1 / (1 - beta2)**0.5 updates keeps them from undoing the base model.

    >>> [learning_rate(OptimizerConfig(lr=0.4, warmup=4), done) for done in (0, 1, 3, 9)]
    [0.1, 0.2, 0.4, 0.4]
    """
    return config.lr * min(1.0, (done + 1) / max(1, config.warmup))


def averaging_decay(config: TrainableConfig, done: int) -> float | None:
    """The share of the old average kept at the update after `done` others; None to skip this one.

    With `ema_ramp` the decay rises to its final value, as in Flow-GRPO.

    >>> config = TrainableConfig(ema_decay=0.9, ema_every=8, ema_ramp=True)
    >>> [averaging_decay(config, done) for done in (6, 7, 79, 159)]
    [None, 0.47058823529411764, 0.898876404494382, 0.9]
    """
    if (done + 1) % config.ema_every:
        return None
    ramp = (1 + done) / (10 + done) if config.ema_ramp else 1.0
    return min(ramp, config.ema_decay)
