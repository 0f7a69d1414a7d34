"""The plan of a rollout: grid, sampler and credit compiled into a few columns of numbers.

A plan is computed in float64 and then lives, in float32, beside the network. It is in the units
of the network's own prediction, whatever that is: x_next = mean_x x + mean_p prediction + std z.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .branches import UNBRANCHED, Branches
from .credit import Credit, CreditRule
from .guidance import implicit_reward
from .predictions import PREDICTIONS, Estimates
from .ratios import StepBatch, rows_to
from .schedules import DiffusionGrid, FlowGrid
from .transitions import Steps, Transition

Table = Float[Tensor, " n"]
Mask = Bool[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A sampler with its credit, one row per step.

    Attributes:
        timesteps: the denoiser's input at each step.
        mean_x: coefficient of the latent in the step's mean.
        mean_p: coefficient of the prediction in the step's mean.
        std: standard deviation of the step; 0 where it is deterministic.
        x0_x: coefficient of the latent in the clean estimate.
        x0_p: coefficient of the prediction in the clean estimate.
        weight: native weight, -mean_p / std: log rho's w in units of the prediction.
        credit: the weight that the objective's log rho uses, in the same units.
        scale: lambda of the policy reference + lambda (network - reference); None if the policy is
            the network.
        loss: factor of the objective's term of each step; None for 1.
        interval: length of the step, Delta (sigma for flow, timesteps for diffusion).
        trained: steps that carry a policy and belong to the objective; always on the CPU.
        kl: factor of each step's KL term; None for 1.
        compared: steps whose KL term is not 0 times; None for all; always on the CPU.
        branches: the steps at which images that share their path part.
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
    scale: Table | None = None
    loss: Table | None = None
    kl: Table | None = None
    compared: Mask | None = None
    branches: Branches = UNBRANCHED

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Plan:
        """The plan on a device, its numbers in `dtype`; masks stay on the CPU, for loops."""
        masks = ("trained", "compared")
        columns = {k: v for k, v in self._columns().items() if k not in masks}
        return replace(self, **{k: v.to(device, dtype) for k, v in columns.items()})

    def _columns(self) -> dict[str, Tensor]:
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "branches"}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def segments(self) -> list[Segment]:
        """The paths between splits, in the sampler's order; one, this plan, if nothing splits."""
        before = [0, *self.trained.cumsum(0).tolist()]
        if not self.branches.at:
            return [Segment(self, 1, range(before[-1]))]
        edges = pairwise((0, *self.branches.at, len(self)))
        return [
            Segment(self._part(first, last), leaves, range(before[first], before[last]))
            for (first, last), leaves in zip(edges, self.branches.leaves, strict=True)
        ]

    def _part(self, first: int, last: int) -> Plan:
        """The steps from `first` to before `last`, as a plan that splits nowhere."""
        columns = {name: column[first:last] for name, column in self._columns().items()}
        return replace(self, **columns, branches=UNBRANCHED)

    def policy(self, step: Tensor | int, network: Tensor, reference: Tensor | None) -> Tensor:
        """The policy's prediction: the network's, or reference + lambda (network - reference).

        Args:
            step: the plan's row, of all latents or of each.
            network: its prediction.
            reference: the frozen network's.

        Raises:
            ValueError: if the policy is relative to a reference, and there is none.
        """
        if self.scale is None:
            return network
        if reference is None:
            raise ValueError(
                "credit 'relative' re-parametrises the policy against the frozen network; give its "
                "predictions as the reference"
            )
        scale = self.scale[step]
        return implicit_reward(
            reference, [network], [rows_to(scale, network) if scale.ndim else scale]
        )

    def step_batch(self, row: Tensor | int, x: Tensor, old: Tensor, noise: Tensor) -> StepBatch:
        """The inputs of a log ratio for sampled steps.

        Args:
            row: the plan's row, of all latents or of each.
            x: the latents that the steps started from.
            old: the predictions they were sampled with.
            noise: the noise that was drawn.
        """
        columns = (self.mean_x, self.mean_p, self.std, self.credit)
        return StepBatch(x, old, noise, *(column[row].expand(len(x)) for column in columns))

    def window(self, inside: Mask, deterministic: Plan) -> Plan:
        """Noise and training inside a window alone; elsewhere the sampler without noise.

        Args:
            inside: the steps of the window.
            deterministic: `plan.deterministic` of the same grid.

        Returns:
            The plan; weights and credit inside are those of this plan.
        """
        columns = {
            name: torch.where(inside, getattr(self, name), getattr(deterministic, name))
            for name in ("mean_x", "mean_p", "std")
        }
        return replace(self, **columns, trained=self.trained & inside)

    def comparing(self, chosen: Int[Tensor, " j"]) -> Plan:
        """The KL term of some trained steps alone, as many times as large as there are more steps.

        If every step is as likely to be chosen as another, the mean of the KL stays what it is.

        Args:
            chosen: positions among the trained steps.
        """
        places = self.trained.nonzero().flatten()
        compared = torch.zeros_like(self.trained)
        compared[places[chosen]] = True
        kl = compared.to(self.weight) * (len(places) / len(chosen))
        return replace(self, kl=kl, compared=compared)


@dataclass(frozen=True, slots=True)
class Segment:
    """The steps of a tree's paths between two splits.

    Attributes:
        plan: of these steps alone.
        leaves: images that each of the paths leads to.
        kept: which of the whole plan's trained steps are here.
    """

    plan: Plan
    leaves: int
    kept: range

    def own(self, chosen: Sequence[int]) -> list[int]:
        """Those of some trained steps of the whole plan that are here, counted from here."""
        return [step - self.kept.start for step in chosen if step in self.kept]


def step_set(num_steps: int, drop_last: int = 0) -> Mask:
    """The steps of the objective: all, or all but the last few (DanceGRPO, Flow-GRPO: 1).

    Raises:
        ValueError: if no step is left.
    """
    if not 0 <= drop_last < num_steps:
        raise ValueError(
            f"drop_last is {drop_last} of {num_steps} steps; it is from 0 to {num_steps - 1}"
        )
    mask = torch.ones(num_steps, dtype=torch.bool)
    mask[num_steps - drop_last :] = False
    return mask


MeanOver = Literal["trained", "step_set", "grid"]
"""The steps over which w* is the mean of the native weights.

They are the trained ones, within the window if there is one; all but the last ones, whatever the
window; or every step with a policy.
"""


def _step_sets(num_steps: int, drop_last: int, inside: Mask | None, over: MeanOver) -> list[Mask]:
    """The trained steps, and those of the mean."""
    steps = step_set(num_steps, drop_last)
    trained = steps if inside is None else steps & inside
    means = {"trained": trained, "step_set": steps, "grid": torch.ones_like(steps)}
    return [trained, means[over]]


def plan_diffusion(
    grid: DiffusionGrid,
    transition: Transition,
    credit: CreditRule,
    *,
    prediction_type: str = "epsilon",
    drop_last: int = 0,
    inside: Mask | None = None,
    mean_over: MeanOver = "trained",
) -> Plan:
    """Compile a diffusion sampler.

    Args:
        grid: the sampler's points.
        transition: its kind and noise level.
        credit: how the advantage is distributed over the steps.
        prediction_type: "epsilon", "sample" or "v_prediction".
        drop_last: number of last steps that are not trained (DDPO 0, DanceGRPO, Flow-GRPO 1).
        inside: the steps of a window, the only ones trained; None without a window.
        mean_over: of `MeanOver`; a mean over untrained steps does not keep the mean of the trained
            ones.

    Returns:
        The plan, float64 on the CPU.
    """
    estimates = PREDICTIONS[prediction_type](*grid.levels)
    credited = credit(
        grid, transition, *_step_sets(len(grid.timesteps), drop_last, inside, mean_over)
    )
    return _compile(grid, credited, estimates, per_prediction=estimates.eps_p)


def plan_flow(
    grid: FlowGrid,
    transition: Transition,
    credit: CreditRule,
    *,
    drop_last: int = 0,
    inside: Mask | None = None,
    mean_over: MeanOver = "trained",
) -> Plan:
    """Compile a flow sampler for a network that predicts the velocity.

    Args:
        grid: the sampler's points.
        transition: its kind and noise level.
        credit: how the advantage is distributed over the steps.
        drop_last: number of last steps that are not trained (DDPO 0, DanceGRPO, Flow-GRPO 1).
        inside: the steps of a window, the only ones trained; None without a window.
        mean_over: of `MeanOver`; a mean over untrained steps does not keep the mean of the trained
            ones.

    Returns:
        The plan, float64 on the CPU.
    """
    estimates = PREDICTIONS["velocity"](*grid.levels)
    credited = credit(
        grid, transition, *_step_sets(len(grid.timesteps), drop_last, inside, mean_over)
    )
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
    """Convert natural units to the prediction's: a difference of eps is eps_p times one of it.

    Raises:
        ValueError: if a step is undefined (an epsilon network at alpha_bar = 0).
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
        scale=_unless_one(credited.scale),
        loss=_unless_one(credited.loss),
        interval=grid.intervals,
        trained=credited.trained,
    )


def _unless_one(factors: Table) -> Table | None:
    return factors if (factors != 1).any() else None
