"""How much of the advantage each step of a trajectory receives.

Natural units: weights multiply differences of the NOISE for diffusion and of the VELOCITY for
flow. There log rho = -(w <diff, eps_old> + 1/2 ||w diff||^2), so w is the step's credit (paper
Prop. 1 and 2). The native weight is what the sampler happens to give; the proportionate one is in
proportion to the step's interval, with the same mean.

Where the paper's text leaves the procedure open, this is our reading: w* is the mean native weight
over the steps that are trained, and a diffusion step that cannot have it keeps the noise that
comes closest (it is "projected") and takes w* in log rho all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from .predictions import epsilon, velocity
from .schedules import DiffusionGrid, FlowGrid
from .transitions import Ddim, Steps, Transition, ddim_steps, ddpm_std

Table = Float64[Tensor, " n"]
Mask = Bool[Tensor, " n"]
Grid = DiffusionGrid | FlowGrid


@dataclass(frozen=True, slots=True)
class Credit:
    """The sampler's steps and what each counts for.

    Attributes:
        steps: the sampler, with its noise changed where the credit asks for it.
        weight: native weight of these steps, natural units; infinite where the natural prediction
            cannot say anything (alpha_bar = 0), NaN where there is no policy.
        credit: the weight that log rho uses, same units.
        policy: steps that carry a policy, that is noise and a prediction that moves the mean.
        trained: steps of the objective: those with a policy in the configured step set.
        solved: steps whose noise was solved for (Prop. 1).
        projected: steps that had no solution and keep the posterior's noise.
    """

    steps: Steps
    weight: Table
    credit: Table
    policy: Mask
    trained: Mask
    solved: Mask
    projected: Mask


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
    """Credit in proportion to the interval, its mean kept (Prop. 2; for an even grid Prop. 1's w*).

    credit_i = w* Delta_i / mean(Delta), w* = mean(weight), both means over the step set. For flow
    this is zeta Delta_i with zeta = sum(weight) / sum(Delta).

    >>> w, delta = torch.tensor([1.0, 3.0, 9.0]), torch.tensor([2.0, 2.0, 4.0])
    >>> proportionate(w, delta, torch.tensor([True, True, False]))
    tensor([2., 2., 4.])

    Args:
        weight: native weights.
        intervals: length of each step, in any unit.
        over: the step set the means are taken over, at least one step.
        target: w* itself, where it is not to be the mean of the native weights.

    Returns:
        The credit of every step, in the set or not.
    """
    mean = weight[over].mean() if target is None else target
    return mean * intervals / intervals[over].mean()


def solved_std(grid: DiffusionGrid, credit: Table) -> tuple[Table, Mask]:
    """The noise level at which a DDIM step's native weight IS its credit (Proposition 1).

    (1 + w^2) sigma^2 - 2 A w sigma + (A^2 - B^2) = 0, smaller root, in the form that does not
    cancel: sigma = (A^2 - B^2) / (A w + sqrt(B^2 (1 + w^2) - A^2)), with
    A^2 = abar_next (1 - abar) / abar and B^2 = 1 - abar_next.

    Args:
        grid: the sampler's points.
        credit: wanted weight of each step, > 0.

    Returns:
        The standard deviations, and which steps have one. The posterior's weight (eta = 1) is the
        smallest a step can have; where it exceeds the credit there is no solution, and the
        posterior's standard deviation is given.
    """
    a2 = grid.alpha_bar_next * (1 - grid.alpha_bar) / grid.alpha_bar
    b2 = 1 - grid.alpha_bar_next
    discriminant = b2 * (1 + credit**2) - a2
    solvable = (discriminant >= 0) & (b2 > 0) & (a2 > b2)
    root = discriminant.clamp(min=0).sqrt()
    std = (a2 - b2) / (a2.sqrt() * credit + root)
    return torch.where(solvable, std, ddpm_std(grid)), solvable


def proportionate_sampler(
    grid: DiffusionGrid, steps: Steps, over: Mask, target: float | None = None
) -> Credit:
    """Proportionate credit by changing DDIM's noise (Proposition 1), projected where it must be.

    Args:
        grid: the sampler's points.
        steps: the native sampler, whose weights w* is the mean of.
        over: the step set.
        target: w* itself, where it is not to be that mean; > 0.

    Returns:
        The changed sampler and its credit.
    """
    native = _native(grid, steps, over)
    credit = proportionate(native.weight, grid.intervals, _finite(native), target)
    std, solvable = solved_std(grid, credit)
    changed = ddim_steps(grid, torch.where(native.policy, std, native.steps.std))
    solved = native.policy & solvable
    return Credit(
        changed,
        native_weights(grid, changed),
        _or_native(credit, native_weights(grid, changed)),
        native.policy,
        native.trained,
        solved,
        native.policy & ~solved,
    )


def proportionate_objective(
    grid: Grid, steps: Steps, over: Mask, target: float | None = None
) -> Credit:
    """Proportionate credit in log rho alone, the sampler untouched (Proposition 2).

    Args:
        grid: the sampler's points.
        steps: the sampler.
        over: the step set.
        target: the mean credit, where it is not to be the mean native weight; > 0.

    Returns:
        The same sampler with proportionate credit.
    """
    native = _native(grid, steps, over)
    credit = proportionate(native.weight, grid.intervals, _finite(native), target)
    return Credit(
        steps,
        native.weight,
        _or_native(credit, native.weight),
        native.policy,
        native.trained,
        native.solved,
        native.projected,
    )


def _native(grid: Grid, steps: Steps, over: Mask) -> Credit:
    weight = native_weights(grid, steps)
    policy = (steps.std > 0) & ~weight.isnan()
    if not (policy & over).any():
        raise ValueError(
            "no step carries a policy: the sampler adds no noise at any step of the step set; "
            "raise the noise level or widen the step set"
        )
    nowhere = torch.zeros_like(policy)
    return Credit(steps, weight, weight, policy, policy & over, nowhere, nowhere)


def _finite(native: Credit) -> Mask:
    return native.trained & native.weight.isfinite()


def _or_native(credit: Table, weight: Table) -> Table:
    """Infinite where the native weight is: at alpha_bar = 0 natural units do not apply (`plan`)."""
    return torch.where(weight.isinf(), weight, credit)


# --- the choices ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Native:
    """The sampler's own weights: the baselines."""

    name: ClassVar[str] = "native"

    def __call__(self, grid: Grid, transition: Transition, over: Mask) -> Credit:
        """The sampler's steps on a grid with their own weights as credit."""
        return _native(grid, transition(grid), over)


@dataclass(frozen=True, slots=True)
class Proportionate:
    """PCPO: Proposition 1 for DDIM (its noise is solved for), Proposition 2 for flow.

    Attributes:
        target: w*, the mean credit; the mean of the native weights where None.
    """

    name: ClassVar[str] = "proportionate"
    target: float | None = None

    def __call__(self, grid: Grid, transition: Transition, over: Mask) -> Credit:
        """The sampler's steps on a grid, its noise solved for, with proportionate credit."""
        if isinstance(grid, DiffusionGrid):
            return proportionate_sampler(grid, transition(grid), over, self.target)
        return proportionate_objective(grid, transition(grid), over, self.target)


@dataclass(frozen=True, slots=True)
class ObjectiveOnly:
    """Proportionate credit in log rho and the native sampler, for diffusion and flow alike.

    Attributes:
        target: the mean credit; the mean of the native weights where None.
    """

    name: ClassVar[str] = "objective_only"
    target: float | None = None

    def __call__(self, grid: Grid, transition: Transition, over: Mask) -> Credit:
        """The sampler's steps on a grid with proportionate credit."""
        return proportionate_objective(grid, transition(grid), over, self.target)


CREDITS = {c.name: c for c in (Native, Proportionate, ObjectiveOnly)}
CHANGES_SAMPLER = {(Proportionate.name, Ddim.name)}
