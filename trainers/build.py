"""From names and numbers in a config to the method's objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..pcpo import Plan, advantages, credit, objectives, selection, transitions
from ..pcpo.plan import deterministic, plan_diffusion
from ..pcpo.schedules import DiffusionGrid, ddim_grid
from .config import (
    AdvantageConfig,
    ConfigError,
    MethodConfig,
    OptimizerConfig,
    SamplerConfig,
    TrainConfig,
)
from .families import Family

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}

Advantage = Callable[[Float[Tensor, " b"], list[str]], Float[Tensor, " b"]]


def transition_of(config: SamplerConfig) -> transitions.Transition:
    """The sampler's kind at its noise level."""
    kind: Any = transitions.TRANSITIONS[config.transition]
    return kind(config.noise_level)


def credit_of(config: MethodConfig) -> Any:
    """How the advantage is shared out over the steps."""
    kind: Any = credit.CREDITS[config.credit]
    return kind() if kind is credit.Native else kind(config.target_weight)


def objective_of(config: MethodConfig) -> Any:
    """The clipped objective."""
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

    Args:
        config: peak and warm-up.
        done: updates before this one.

    Returns:
        The learning rate, positive.
    """
    return config.lr * min(1.0, (done + 1) / max(1, config.warmup))


@dataclass(frozen=True, slots=True)
class Plans:
    """The sampler of a run.

    Attributes:
        stochastic: with noise and credit; float64 on the CPU.
        ode: the same grid without noise.
    """

    stochastic: Plan
    ode: Plan

    def at(self, iteration: int, chosen: Any) -> Plan:
        """The plan of an iteration; a sliding window leaves noise inside itself alone."""
        if not chosen.stochastic_window:
            return self.stochastic
        inside = chosen.inside(self.stochastic.trained, iteration)
        return self.stochastic.window(inside, self.ode)


def diffusion_grid(family: Family, steps: int, spacing: str = "model") -> DiffusionGrid:
    """The timesteps of a model's own noise schedule.

    Args:
        family: the model.
        steps: of the sampler.
        spacing: of the timesteps; "model" takes the checkpoint's own.

    Returns:
        The grid.
    """
    schedule = family.scheduler_config
    return ddim_grid(
        steps,
        family.alpha_bars,
        spacing=schedule.timestep_spacing if spacing == "model" else spacing,
        steps_offset=schedule.steps_offset,
        final_alpha_bar=schedule.final_alpha_bar,
    )


def ddim_plan(family: Family, steps: int, spacing: str, eta: float, share: Any = None) -> Plan:
    """DDIM on a model's own noise schedule.

    Args:
        family: the model.
        steps: of the sampler.
        spacing: as `diffusion_grid` takes it.
        eta: 0 without noise, 1 DDPM's.
        share: the credit, where it is to change the sampler.

    Returns:
        The plan, float64 on the CPU.
    """
    grid = diffusion_grid(family, steps, spacing)
    kind = family.scheduler_config.prediction_type
    transition = transitions.Ddim(eta or 1.0)
    plan = plan_diffusion(grid, transition, share or credit.Native(), prediction_type=kind)
    return plan if eta else deterministic(plan, grid, transition, kind)


def plans_of(config: TrainConfig, family: Family) -> Plans:
    """Compile the run's sampler for a model.

    Args:
        config: the run.
        family: the model.

    Returns:
        The plans.

    Raises:
        ConfigError: where the model's kind does not go with the sampler's, or a step is undefined.
    """
    transition = transition_of(config.sampler)
    if transition.grid is not DiffusionGrid:
        raise ConfigError(
            f"sampler.transition is '{config.sampler.transition}', which is for flow models; "
            f"{family.name} is a diffusion model: use 'ddim'"
        )
    kind = family.scheduler_config.prediction_type
    grid = diffusion_grid(family, config.sampler.steps, config.sampler.spacing)
    try:
        plan = plan_diffusion(
            grid,
            transition,
            credit_of(config.method),
            prediction_type=kind,
            drop_last=config.sampler.drop_last,
        )
    except ValueError as error:
        raise ConfigError(f"sampler: {error}") from error
    return Plans(plan, deterministic(plan, grid, transition, kind))
