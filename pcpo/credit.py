"""How much of the advantage each step of a trajectory receives.

Natural units: weights multiply differences of the NOISE for diffusion and of the VELOCITY for
flow. There log rho = -(w <diff, eps_old> + 1/2 ||w diff||^2), so w is the step's credit (paper
Prop. 1 and 2). The native weight is what the sampler happens to give; the proportionate one is
proportional to the step's interval, with the same mean.

On flow that is all (Prop. 2). On DDIM no weight can be constant at every step AND the mean of the
native ones, since DDPM's weight is the smallest a step can have. Four readings of Prop. 1:

- `Published`, what the authors run: more noise than DDPM's at some steps, less at others, and one
  number as credit. The noise is the LARGER root of Prop. 1's equation, where the true weight
  C / sigma is not that number: in effect uniform credit on a slightly noisier sampler.
- `Exact`: the smaller root, where the true weight IS the credit, at the price of most of the noise.
- `ObjectiveOnly`: the native sampler, the credit in log rho alone.
- `Relative`: the native sampler and a policy re-parametrised against the frozen model, which makes
  the true weight constant.

A fifth way leaves the ratio and its clipping alone: `WeightedLoss` multiplies each step's term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from .predictions import epsilon, velocity
from .schedules import DiffusionGrid, FlowGrid
from .transitions import Steps, Transition, ddim_steps, ddpm_std

Table = Float64[Tensor, " n"]
Mask = Bool[Tensor, " n"]
Grid = DiffusionGrid | FlowGrid

NOISE_ENERGY = 1.2582031524
"""Sum of sigma^2 over DDPM's in the authors' schedule: 50 steps, leading spacing, w = 4.5."""


@dataclass(frozen=True, slots=True)
class Credit:
    """The sampler's steps and the credit of each.

    Attributes:
        steps: the sampler, with its noise changed if the credit requires it.
        weight: native weight of these steps, natural units; infinite where the natural prediction
            is undefined (alpha_bar = 0), NaN where there is no policy.
        credit: the weight that log rho uses, same units.
        scale: lambda of the policy's prediction, reference + lambda (network - reference); 1 except
            for `Relative`.
        loss: factor of the objective's term of each step; 1 except for `WeightedLoss`.
        policy: steps that carry a policy, that is noise and a prediction that moves the mean.
        trained: steps of the objective: those with a policy in the configured step set.
        solved: steps whose noise was solved for (Prop. 1).
        projected: steps that had no solution and keep the native noise.
        solve_weight: w of the larger root; None except for `Published`.
    """

    steps: Steps
    weight: Table
    credit: Table
    scale: Table
    loss: Table
    policy: Mask
    trained: Mask
    solved: Mask
    projected: Mask
    solve_weight: float | None = None

    @property
    def share(self) -> Table:
        """Each step's share of the credit, in the network's prediction: credit * scale * loss."""
        return self.credit * self.scale * self.loss

    @property
    def true_weight(self) -> Table:
        """Each step's weight in the density of the policy: weight * scale."""
        return self.weight * self.scale


def native_weights(grid: Grid, steps: Steps) -> Table:
    """The weight w of each step in natural units (paper Eq. 6 for DDIM, Eq. 11 for flow).

    DDIM: C_t / sigma_t with C_t = A_t - sqrt(1 - abar_next - sigma_t^2). Flow SDE:
    (sqrt(Delta) / g) (1 + (1 - sigma) g^2 / (2 sigma)).

    Args:
        grid: the sampler's points.
        steps: the sampler on them.

    Returns:
        Weights >= 0; NaN or infinite where a step has no noise.
    """
    natural = epsilon if isinstance(grid, DiffusionGrid) else velocity
    _, mean_p = steps.in_terms_of(natural(*grid.levels))
    return -mean_p / steps.std


def proportionate(
    weight: Table, intervals: Table, over: Mask, target: float | None = None
) -> Table:
    """Credit proportional to the interval, its mean kept (Prop. 2; for an even grid Prop. 1's w*).

    credit_i = w* Delta_i / mean(Delta), w* = mean(weight), both means over the step set. For flow
    this is zeta Delta_i with zeta = sum(weight) / sum(Delta).

    >>> w, delta = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([2.0, 2.0, 4.0])
    >>> proportionate(w, delta, torch.tensor([True, True, False]))
    tensor([2., 2., 4.])

    Args:
        weight: native weights.
        intervals: length of each step, in any unit.
        over: the step set the means are taken over, at least one step.
        target: w* itself; the mean of the native weights if None.

    Returns:
        The credit of every step, in the set or not.
    """
    mean = weight[over].mean() if target is None else target
    return mean * intervals / intervals[over].mean()


# --- the noise of Proposition 1 ------------------------------------------------------------------


def solved_std(
    grid: DiffusionGrid, weight: Float64[Tensor, "*m n"], *, larger: bool = False
) -> tuple[Float64[Tensor, "*m n"], Bool[Tensor, "*m n"]]:
    """The noise levels that Proposition 1's equation gives a DDIM step.

    (1 + w^2) sigma^2 - 2 A w sigma + (A^2 - B^2) = 0 with A^2 = abar_next (1 - abar) / abar and
    B^2 = 1 - abar_next. At the smaller root the step's weight C / sigma = (A - sqrt(B^2 -
    sigma^2)) / sigma is w. At the larger one (A + sqrt(B^2 - sigma^2)) / sigma is w: the equation's
    other branch, which is no step's weight. Neither form below cancels.

    Args:
        grid: the sampler's points.
        weight: w of each step, > 0.
        larger: which root.

    Returns:
        The standard deviations, at most B, and which steps have one. DDPM's weight (eta = 1) is
        the smallest a step can have; where it exceeds w there is no root, and the result is DDPM's
        standard deviation.
    """
    a2 = grid.alpha_bar_next * (1 - grid.alpha_bar) / grid.alpha_bar
    b2 = 1 - grid.alpha_bar_next
    discriminant = b2 * (1 + weight**2) - a2
    solvable = (discriminant >= 0) & (b2 > 0) & (a2 > b2)
    half = a2.sqrt() * weight + discriminant.clamp(min=0).sqrt()
    std = half / (1 + weight**2) if larger else (a2 - b2) / half
    return torch.where(solvable, std, ddpm_std(grid)), solvable


def solve_weight(grid: DiffusionGrid, energy: float = NOISE_ENERGY) -> float:
    """The w at which the larger root gives a sampler the noise of the authors' schedule.

    Their w = 4.5 belongs to 50 steps. On another grid the same sum of sigma^2, `energy` times
    DDPM's, stands for it; the result is the largest w that has this sum.

    Args:
        grid: the sampler's points.
        energy: sum of sigma^2 over DDPM's, > 0.

    Returns:
        w; if none reaches the energy, the one with the most.
    """
    wanted = energy * ddpm_std(grid).square().sum()

    def noise(w: Float64[Tensor, " m"]) -> Float64[Tensor, " m"]:
        each = w[:, None].expand(-1, len(grid.timesteps))
        return solved_std(grid, each, larger=True)[0].square().sum(dim=1)

    tried = torch.logspace(3, -2, 5001, dtype=torch.float64)
    enough = noise(tried) >= wanted
    if not enough.any():
        return tried[noise(tried).argmax()].item()
    first = int(enough.int().argmax())
    high, low = tried[first - 1 : first], tried[first : first + 1]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if noise(middle) >= wanted else (low, middle)
    return low.item()


def noise_energy(grid: DiffusionGrid, credit: Credit) -> float:
    """Sum of sigma^2 of a credit's sampler over DDPM's."""
    return (credit.steps.std.square().sum() / ddpm_std(grid).square().sum()).item()


# --- the choices ---------------------------------------------------------------------------------


class CreditRule(Protocol):
    """How the advantage is distributed: hyper-parameters in the fields, a grid's credit by a call.

    A call takes the grid, the sampler on it, the objective's step set and optionally another set,
    whose mean native weight is w*.
    """

    name: ClassVar[str]

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The sampler's steps and the credit of each.

        Raises:
            ValueError: if no step of a set carries a policy, or no step has the requested weight.
        """
        ...


@dataclass(frozen=True, slots=True)
class Native:
    """The sampler's own weights: the baselines."""

    name: ClassVar[str] = "native"

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The sampler's steps with their own weights as credit.

        Raises:
            ValueError: if no step of the set carries a policy.
        """
        steps = transition(grid)
        weight = native_weights(grid, steps)
        policy = (steps.std > 0) & ~weight.isnan()
        if not (policy & over).any():
            raise ValueError(
                "no step carries a policy: the sampler adds no noise at any step of the step set; "
                "raise the noise level or widen the step set"
            )
        nowhere, one = torch.zeros_like(policy), torch.ones_like(weight)
        return Credit(steps, weight, weight, one, one, policy, policy & over, nowhere, nowhere)


@dataclass(frozen=True, slots=True)
class ObjectiveOnly:
    """Proportionate credit in log rho and the native sampler (Prop. 2; diffusion and flow alike).

    Attributes:
        target: the mean credit; the mean of the native weights if None.
    """

    name: ClassVar[str] = "objective_only"
    target: float | None = None

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The sampler's steps with proportionate credit; the native one where that is infinite."""
        native = Native()(grid, transition, over)
        known = native.policy & native.weight.isfinite()
        kept = known & (over if mean_over is None else mean_over)
        credit = proportionate(native.weight, grid.intervals, kept, self.target)
        return replace(native, credit=torch.where(native.weight.isinf(), native.weight, credit))


@dataclass(frozen=True, slots=True)
class Exact:
    """Solves for DDIM's noise so that each step's true weight is its credit (Prop. 1).

    A step without a solution keeps the native noise (it is projected) and takes the credit all the
    same. The remaining noise has 0.37 of DDPM's energy at 50 steps, and a step's signal to noise
    falls with it.

    Attributes:
        target: w*, the mean credit; the mean of the native weights if None.
    """

    name: ClassVar[str] = "exact"
    target: float | None = None

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The changed sampler with proportionate credit."""
        points = _diffusion(grid, self.name)
        shared = ObjectiveOnly(self.target)(points, transition, over, mean_over)
        std, solvable = solved_std(points, shared.credit)
        if self.target is not None:
            _check_solvable(shared, solvable, self.target, "target weight")
        return _with_noise(points, shared, std, solvable)


@dataclass(frozen=True, slots=True)
class Published:
    """What the authors run on DDIM: the larger root's noise, and uniform credit in log rho.

    sigma = eta (w A + sqrt(B^2 (1 + w^2) - A^2)) / (1 + w^2), the credit the mean native weight
    (for w = 4.5 at 50 steps 4.5 / 8.7058 = 0.5169). The true weight C / sigma stays uneven, 0.385
    to 3.368 there. Source: the first author's follow-up repository jaylee2000/rsm, commit e8be3df,
    sd15_zeroth_order, "adapted from the PCPO codebase"; that the paper's figures were made so is
    inferred.

    Attributes:
        target: w*, the mean credit; the mean of the native weights if None.
        solve_weight: w of the noise; `solve_weight` of the grid if None.
    """

    name: ClassVar[str] = "published"
    target: float | None = None
    solve_weight: float | None = None

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The changed sampler with proportionate credit."""
        points = _diffusion(grid, self.name)
        shared = ObjectiveOnly(self.target)(points, transition, over, mean_over)
        w = solve_weight(points) if self.solve_weight is None else self.solve_weight
        std, solvable = solved_std(points, torch.full_like(shared.weight, w), larger=True)
        _check_solvable(shared, solvable, w, "solve weight")
        std = getattr(transition, "eta", 1.0) * std
        return replace(_with_noise(points, shared, std, solvable), solve_weight=w)


@dataclass(frozen=True, slots=True)
class Relative:
    """The native sampler and the policy reference + lambda (network - reference).

    lambda_t = w*_t / w_t makes the true weight of the network's prediction proportionate at every
    step, and no noise is lost. The reference is the frozen model. Sampling with the same lambda
    reproduces the policy; plain sampling does not. The authors' "uw-lambda".

    Attributes:
        target: w*, the mean credit; the mean of the native weights if None.
    """

    name: ClassVar[str] = "relative"
    target: float | None = None

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The native sampler and weights, with the policy's scale at each step."""
        shared = ObjectiveOnly(self.target)(grid, transition, over, mean_over)
        return replace(shared, credit=shared.weight, scale=_over_native(shared))


@dataclass(frozen=True, slots=True)
class WeightedLoss:
    """The native sampler, ratio and clipping; each step's term of the objective times w*_t / w_t.

    The gradient on policy is `ObjectiveOnly`'s; the clipping is the baseline's.

    Attributes:
        target: w*, the mean weight of a step; the mean of the native weights if None.
    """

    name: ClassVar[str] = "weighted_loss"
    target: float | None = None

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The native sampler and weights, with the factor of each step's term."""
        shared = ObjectiveOnly(self.target)(grid, transition, over, mean_over)
        return replace(shared, credit=shared.weight, loss=_over_native(shared))


@dataclass(frozen=True, slots=True)
class Proportionate:
    """PCPO: `Published` on DDIM, Proposition 2 on flow.

    Attributes:
        target: w*, the mean credit; the mean of the native weights if None.
        solve_weight: of `Published`.
    """

    name: ClassVar[str] = "proportionate"
    target: float | None = None
    solve_weight: float | None = None

    def __call__(
        self, grid: Grid, transition: Transition, over: Mask, mean_over: Mask | None = None
    ) -> Credit:
        """The sampler's steps, on DDIM with the authors' noise, and proportionate credit."""
        rule = ObjectiveOnly(self.target)
        if isinstance(grid, DiffusionGrid):
            rule = Published(self.target, self.solve_weight)
        return rule(grid, transition, over, mean_over)


def _over_native(shared: Credit) -> Table:
    """w*_t / w_t; 1 where the native weight is undefined."""
    known = shared.policy & shared.weight.isfinite()
    return torch.where(known, shared.credit / shared.weight, 1.0)


def _diffusion(grid: Grid, name: str) -> DiffusionGrid:
    if not isinstance(grid, DiffusionGrid):
        raise ValueError(f"credit '{name}' changes DDIM's noise; on flow take 'proportionate'")
    return grid


def _check_solvable(native: Credit, solvable: Mask, weight: float, what: str) -> None:
    if not (solvable & native.trained).any():
        least = native.weight[native.trained].min().item()
        raise ValueError(
            f"the {what} is {weight:g}, at which no trained step's noise can be solved for: their "
            f"native weights begin at {least:.4g}; take more than that, or leave it out"
        )


def _with_noise(grid: DiffusionGrid, native: Credit, std: Table, solvable: Mask) -> Credit:
    """The credit on a sampler whose noise is `std` at the steps that have a policy."""
    solved = native.policy & solvable
    steps = ddim_steps(grid, torch.where(solved, std, native.steps.std))
    weight, projected = native_weights(grid, steps), native.policy & ~solved
    credit = torch.where(weight.isinf(), weight, native.credit)
    return replace(
        native, steps=steps, weight=weight, credit=credit, solved=solved, projected=projected
    )
