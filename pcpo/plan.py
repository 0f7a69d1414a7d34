"""The plan of a rollout: grid, sampler and credit compiled into a few columns of numbers.

A plan is computed in float64 and then lives, in float32, beside the network. It is in the units
of the network's own prediction, whatever that is: x_next = mean_x x + mean_p prediction + std z.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .credit import Credit, Native, ObjectiveOnly, Proportionate
from .predictions import PREDICTIONS, Estimates
from .schedules import DiffusionGrid, FlowGrid
from .transitions import Steps, Transition

Table = Float[Tensor, " n"]
Mask = Bool[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A sampler with its credit, one row a step.

    Attributes:
        timesteps: what the denoiser is told at each step.
        mean_x: coefficient of the latent in the step's mean.
        mean_p: coefficient of the prediction in the step's mean.
        std: standard deviation of the step; 0 where it is deterministic.
        x0_x: coefficient of the latent in the clean estimate.
        x0_p: coefficient of the prediction in the clean estimate.
        weight: native weight, -mean_p / std: log rho's w in units of the prediction.
        credit: the weight that the objective's log rho uses, in the same units.
        interval: length of the step, Delta (sigma for flow, timesteps for diffusion).
        trained: steps that carry a policy and belong to the objective; always on the CPU.
    """

    timesteps: Table
    mean_x: Table
    mean_p: Table
    std: Table
    x0_x: Table
    x0_p: Table
    weight: Table
    credit: Table
    interval: Table
    trained: Mask

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Plan:
        """The plan on a device, its numbers in `dtype`; the mask stays on the CPU, for loops."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trained"}
        return Plan(**{k: v.to(device, dtype) for k, v in columns.items()}, trained=self.trained)

    def window(self, inside: Mask, deterministic: Plan) -> Plan:
        """Noise and training inside a window alone; elsewhere the sampler without noise.

        Args:
            inside: the steps of the window.
            deterministic: `plan.deterministic` of the same grid.

        Returns:
            The plan; weights and credit inside are those of the full plan.
        """
        columns = {
            name: torch.where(inside, getattr(self, name), getattr(deterministic, name))
            for name in ("mean_x", "mean_p", "std")
        }
        return replace(self, **columns, trained=self.trained & inside)


def step_set(num_steps: int, drop_last: int = 0) -> Mask:
    """The steps of the objective: all, or all but the last few (DanceGRPO, Flow-GRPO: 1)."""
    mask = torch.ones(num_steps, dtype=torch.bool)
    mask[num_steps - drop_last :] = False
    return mask


def plan_diffusion(
    grid: DiffusionGrid,
    transition: Transition,
    credit: Native | Proportionate | ObjectiveOnly,
    *,
    prediction_type: str = "epsilon",
    drop_last: int = 0,
) -> Plan:
    """Compile a diffusion sampler.

    Args:
        grid: the sampler's points.
        transition: its kind and noise level.
        credit: how the advantage is shared out.
        prediction_type: "epsilon", "sample" or "v_prediction".
        drop_last: how many of the last steps are not trained (DDPO 0, DanceGRPO 1).

    Returns:
        The plan, float64 on the CPU.
    """
    estimates = PREDICTIONS[prediction_type](*grid.levels)
    credited = credit(grid, transition, step_set(len(grid.timesteps), drop_last))
    return _compile(grid, credited, estimates, per_prediction=estimates.eps_p)


def plan_flow(
    grid: FlowGrid,
    transition: Transition,
    credit: Native | Proportionate | ObjectiveOnly,
    *,
    drop_last: int = 0,
) -> Plan:
    """Compile a flow sampler for a network that predicts the velocity.

    Args:
        grid: the sampler's points.
        transition: its kind and noise level.
        credit: how the advantage is shared out.
        drop_last: how many of the last steps are not trained (DanceGRPO and Flow-GRPO 1).

    Returns:
        The plan, float64 on the CPU.
    """
    estimates = PREDICTIONS["velocity"](*grid.levels)
    credited = credit(grid, transition, step_set(len(grid.timesteps), drop_last))
    return _compile(grid, credited, estimates, per_prediction=torch.ones_like(grid.timesteps))


def deterministic(
    plan: Plan,
    grid: DiffusionGrid | FlowGrid,
    transition: Transition,
    prediction_type: str = "velocity",
) -> Plan:
    """The same grid sampled without noise (the ODE, DDIM at eta = 0); nothing is trained."""
    steps = transition.deterministic(grid)
    mean_x, mean_p = steps.in_terms_of(PREDICTIONS[prediction_type](*grid.levels))
    return replace(
        plan, mean_x=mean_x, mean_p=mean_p, std=steps.std, trained=torch.zeros_like(plan.trained)
    )


def _compile(
    grid: DiffusionGrid | FlowGrid, credited: Credit, estimates: Estimates, per_prediction: Tensor
) -> Plan:
    """Turn natural units into the prediction's: a difference of eps is eps_p times one of it.

    Raises:
        ValueError: where a step is undefined (an epsilon network at alpha_bar = 0).
    """
    steps: Steps = credited.steps
    mean_x, mean_p = steps.in_terms_of(estimates)
    undefined = ~(mean_x.isfinite() & mean_p.isfinite())
    if undefined.any():
        raise ValueError(
            f"steps {undefined.nonzero().flatten().tolist()} start from pure noise "
            "(alpha_bar = 0), where this prediction type says nothing about the image; use a "
            "v_prediction model or a schedule without zero terminal SNR"
        )
    weight = torch.where(credited.policy, -mean_p / steps.std, 0.0)
    credit = torch.where(credited.credit.isfinite(), credited.credit * per_prediction, weight)
    return Plan(
        timesteps=grid.timesteps,
        mean_x=mean_x,
        mean_p=mean_p,
        std=steps.std,
        x0_x=estimates.x0_x,
        x0_p=estimates.x0_p,
        weight=weight,
        credit=torch.where(credited.policy, credit, 0.0),
        interval=grid.intervals,
        trained=credited.trained,
    )
