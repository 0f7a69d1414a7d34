"""Make the method's objects from a config."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ...pcpo import advantages, credit, objectives, selection, transitions
from ..config.train_config import (
    AdvantageConfig,
    MethodConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainableConfig,
)

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def transition_of(config: SamplerConfig) -> transitions.Transition:
    """The sampler's transition at its noise level."""
    kind: Any = transitions.TRANSITIONS[config.transition]
    return kind(config.noise_level)


def credit_of(config: MethodConfig) -> Any:
    """How the advantage is distributed over the steps."""
    kind: Any = credit.CREDITS[config.credit]
    given = {"target": config.target_weight, "solve_weight": config.solve_weight}
    return kind(**{f.name: given[f.name] for f in fields(kind)})


def objective_of(config: MethodConfig) -> Any:
    clip = objectives.ClipRange(low=config.clip_low, high=config.clip_high)
    return objectives.OBJECTIVES[config.objective](clip)


def selection_of(config: MethodConfig) -> Any:
    """Which steps an iteration trains."""
    if config.selection == "random_fraction":
        return selection.RandomFraction(config.fraction)
    if config.selection == "sliding_window":
        return selection.SlidingWindow(config.window, config.window_stride, config.window_every)
    return selection.AllSteps()


def advantage_of(config: AdvantageConfig) -> Any:
    """How rewards become advantages; a fresh object, since one kind has state."""
    if config.kind == "per_prompt":
        return advantages.RunningAdvantage(
            config.buffer_size, config.min_count, config.offset, config.limit
        )
    if config.kind == "group":
        return advantages.GroupAdvantage(
            config.offset, config.ddof, config.limit, config.global_std
        )
    return advantages.BatchAdvantage(config.offset, config.ddof, config.limit)


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
