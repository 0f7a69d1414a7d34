"""The samplers of a run, on a model's own noise schedule: for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo import Plan, credit, transitions
from ...pcpo.branches import UNBRANCHED, Branches
from ...pcpo.plan import deterministic, plan_diffusion, plan_flow
from ...pcpo.rollout import generator_for
from ...pcpo.schedules import DiffusionGrid, FlowGrid, ddim_grid, flow_grid
from ...pcpo.selection import RandomFraction
from ..config.sections import SamplerConfig
from ..config.train_config import ConfigError, TrainConfig
from ..families import Family
from ..families.flow import FlowSchedule
from ..families.scheduler import SchedulerConfig
from ..reading import shown
from .method import branches_of, credit_of, selection_of, transition_of

Shape = tuple[int, int, int]
"""(channels, height, width) of a latent."""


@dataclass(frozen=True, slots=True)
class Plans:
    """The samplers of a run.

    Attributes:
        stochastic: with noise and credit at every step; float64 on the CPU.
        within: makes the sampler with noise, and credit of its own, inside a window alone; its
            argument is whether each step is inside. Each window is compiled once.
        selection: of the trained steps.
        compared: which of so many trained steps have a KL term, by iteration; None for all.
        branches: of each tree; with several children and no steps, it splits where the window
            begins.
    """

    stochastic: Plan
    within: Callable[[tuple[bool, ...]], Plan]
    selection: Any
    compared: Callable[[int, int], Tensor] | None = None
    branches: Branches = UNBRANCHED

    def at(self, iteration: int) -> Plan:
        """The plan of an iteration; a sliding window has noise only inside."""
        plan, branches = self.stochastic, self.branches
        if self.selection.stochastic_window:
            inside = self.selection.inside(plan.trained, iteration)
            plan = self.within(tuple(inside.tolist()))
            if branches.children > 1 and not branches.at:
                branches = replace(branches, at=(int(inside.nonzero()[0]),))
        plan = replace(plan, branches=branches)
        if self.compared is None:
            return plan
        return plan.comparing(self.compared(int(plan.trained.sum()), iteration))


def diffusion_grid(schedule: SchedulerConfig, steps: int, spacing: str = "model") -> DiffusionGrid:
    """The timesteps of a model's own noise schedule; spacing "model" is the checkpoint's own.

    A schedule that ends in pure noise replaces "leading", which would never begin there.
    """
    is_own = spacing == "model" or (spacing == "leading" and schedule.rescale_betas_zero_snr)
    return ddim_grid(
        steps,
        schedule.alpha_bars(),
        spacing=schedule.timestep_spacing if is_own else spacing,
        steps_offset=schedule.steps_offset,
        final_alpha_bar=schedule.final_alpha_bar,
    )


def sigma_grid(
    schedule: FlowSchedule, shape: Shape, steps: int, kind: str, shift: float | None = None
) -> FlowGrid:
    """The sigmas of a flow model.

    Args:
        shape: of a latent; a dynamic shift depends on its size.
    """
    tokens = shape[1] * shape[2] // schedule.patch**2
    return flow_grid(
        steps,
        kind=kind,
        shift=schedule.shift_of(tokens, steps) if shift is None else shift,
        num_train=schedule.num_train_timesteps,
    )


def looking_plan(
    family: Family,
    shape: Shape,
    steps: int,
    noise: float,
    sampler: SamplerConfig,
    share: Any = None,
) -> Plan:
    """An evaluation sampler, the same whatever a model was trained by; float64 on the CPU.

    Args:
        noise: 0 for none; DDIM's eta, or for flow models the share of the noise renewed at each
            step (CPS), to 1.
        sampler: the spacing, or the grid and shift, of the points.
        share: the credit, if it is to change the sampler.
    """
    schedule, chosen = family.schedule, share or credit.Native()
    if isinstance(schedule, FlowSchedule):
        points = sigma_grid(schedule, shape, steps, sampler.grid, sampler.shift)
        if noise and steps > 1:  # the last step of CPS has none, so a single one has none at all
            return plan_flow(points, transitions.Cps(noise), chosen)
        sde = transitions.DanceSde()
        return deterministic(plan_flow(points, sde, chosen), points, sde)
    grid, kind = diffusion_grid(schedule, steps, sampler.spacing), schedule.prediction_type
    ddim = transitions.Ddim(noise or 1.0)
    plan = plan_diffusion(grid, ddim, chosen, prediction_type=kind)
    return plan if noise else deterministic(plan, grid, ddim, kind)


def whole_timesteps(sigmas: Float[Tensor, " n"], num_train: int) -> Float[Tensor, " n"]:
    """Sigmas in whole training timesteps, rounded down (DanceGRPO: int(1000 sigma) / 1000).

    A sigma that is whole but for its last digit stays.

    >>> whole_timesteps(torch.tensor([1.0, 0.97826, 0.9]), 1000)
    tensor([1.0000, 0.9780, 0.9000])
    """
    return torch.floor(sigmas * num_train + 1e-4) / num_train


def plans_of(config: TrainConfig, family: Family, shape: Shape) -> Plans:
    """Compile the run's samplers for a model; `ConfigError` if a step is undefined."""
    sampler, transition = config.sampler, transition_of(config.sampler)
    schedule, share = family.schedule, credit_of(config.method)
    sets: Any = {"drop_last": sampler.drop_last, "mean_over": config.method.mean_over}
    try:
        if isinstance(schedule, FlowSchedule):
            points = sigma_grid(schedule, shape, sampler.steps, sampler.grid, sampler.shift)
            timesteps, kind = points.timesteps, "velocity"
            if sampler.whole_timesteps:
                timesteps = whole_timesteps(timesteps, schedule.num_train_timesteps)
            compiled = partial(plan_flow, points, transition, share, **sets)
        else:
            points = diffusion_grid(schedule, sampler.steps, sampler.spacing)
            timesteps, kind = points.timesteps, schedule.prediction_type
            sets["prediction_type"] = kind
            compiled = partial(plan_diffusion, points, transition, share, **sets)
        plan = replace(compiled(), timesteps=timesteps)
        still = deterministic(plan, points, transition, kind)
    except ValueError as error:
        raise ConfigError(f"sampler: {error}") from error

    def within(window: tuple[bool, ...]) -> Plan:
        inside = torch.tensor(window)
        return replace(compiled(inside=inside), timesteps=timesteps).window(inside, still)

    def compared(steps: int, iteration: int) -> Tensor:
        generator = generator_for(config.run.seed, "kl", iteration)
        return RandomFraction(config.method.kl_fraction)(steps, generator)

    all_or_some = compared if config.method.kl_fraction < 1 else None
    selection = selection_of(config.method, config.run.seed)
    plans = Plans(plan, cache(within), selection, all_or_some, branches_of(sampler))
    if sampler.branch_at:
        _check_branches(plans.at(0))
    return plans


def _check_branches(plan: Plan) -> None:
    """Refuse a split after which no step carries noise: all that follows would be equal."""
    ends = (*plan.branches.at[1:], len(plan))
    for first, last in zip(plan.branches.at, ends, strict=True):
        if not (plan.std[first:last] > 0).any():
            noisy = plan.std.nonzero().flatten().tolist()
            raise ConfigError(
                f"sampler.branch_at has {first}, but no step from there to {last - 1} carries "
                f"noise, so that the images would be equal; those with noise are {shown(noisy)}"
            )
