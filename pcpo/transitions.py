"""One step of a sampler as a Gaussian, x_next ~ N(mean, std^2), for every step of a grid at once.

The mean of every sampler here is linear in the latent and in the two estimates a network gives,

    mean = m_x x + m_x0 x0 + m_eps eps,

so a sampler is four columns of numbers. The predictions' own linear maps (`predictions`) turn them
into the two columns that a rollout uses: mean = mean_x x + mean_p prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float64
from torch import Tensor

from .predictions import Estimates
from .schedules import DiffusionGrid, FlowGrid

Table = Float64[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Steps:
    """A sampler on a grid: one row per step.

    Attributes:
        m_x: coefficient of the latent in the mean.
        m_x0: coefficient of the clean estimate.
        m_eps: coefficient of the noise estimate.
        std: standard deviation of the step, >= 0; 0 is a deterministic step.
    """

    m_x: Table
    m_x0: Table
    m_eps: Table
    std: Table

    def in_terms_of(self, estimates: Estimates) -> tuple[Table, Table]:
        """The mean's coefficients of the latent and of the prediction."""
        mean_x = self.m_x + _times(self.m_x0, estimates.x0_x) + _times(self.m_eps, estimates.eps_x)
        mean_p = _times(self.m_x0, estimates.x0_p) + _times(self.m_eps, estimates.eps_p)
        return mean_x, mean_p


def _times(a: Table, b: Table) -> Table:
    """a b, with 0 for 0 times infinity: an unused estimate may be undefined."""
    return torch.where(a == 0, torch.zeros_like(a), a * b)


# --- diffusion -----------------------------------------------------------------------------------


def ddpm_std(grid: DiffusionGrid) -> Table:
    """The posterior's standard deviation, DDIM's at eta = 1 (Song et al. 2021, eq. 16)."""
    past, now = grid.alpha_bar_next, grid.alpha_bar
    return ((1 - past) / (1 - now) * (1 - now / past)).clamp(min=0).sqrt()


def ddim_steps(grid: DiffusionGrid, std: Table) -> Steps:
    """DDIM with a given noise level (paper Eq. 4; Song et al. 2021, eq. 12).

    mean = sqrt(abar_next) x0 + sqrt(1 - abar_next - std^2) eps.

    Args:
        grid: the sampler's points.
        std: standard deviation of each step, std^2 <= 1 - alpha_bar_next.
    """
    direction = (1 - grid.alpha_bar_next - std**2).clamp(min=0).sqrt()
    return Steps(torch.zeros_like(std), grid.alpha_bar_next.sqrt(), direction, std)


@dataclass(frozen=True, slots=True)
class Ddim:
    """DDIM with eta times the posterior's noise; DDPO and DanceGRPO on SD use eta = 1.

    Attributes:
        eta: 0 (deterministic) to 1 (DDPM).
    """

    name: ClassVar[str] = "ddim"
    eta: float = 1.0

    def __call__(self, grid: DiffusionGrid) -> Steps:
        """The sampler's steps on a grid."""
        return ddim_steps(grid, self.eta * ddpm_std(grid))

    def deterministic(self, grid: DiffusionGrid) -> Steps:
        """The same sampler without noise."""
        return ddim_steps(grid, torch.zeros_like(grid.alpha_bar))


# --- flow ----------------------------------------------------------------------------------------


def euler_steps(grid: FlowGrid) -> Steps:
    """The flow's ODE, one Euler step: (1 - sigma_next) x0 + sigma_next eps."""
    zero = torch.zeros_like(grid.sigma_next)
    return Steps(zero, 1 - grid.sigma_next, grid.sigma_next, zero)


def flow_sde_steps(grid: FlowGrid, g: Table) -> Steps:
    """The SDE with the flow ODE's marginals, one Euler-Maruyama step (paper Eq. 7-9).

    mean = x - [v + g^2 / (2 sigma) eps] Delta, std = g sqrt(Delta), with v = eps - x0 and
    eps = x + (1 - sigma) v.

    Args:
        grid: the sampler's points.
        g: diffusion coefficient of each step, per sqrt(sigma), >= 0.
    """
    delta = grid.intervals
    extra = g**2 / (2 * grid.sigmas[:-1]) * delta
    return Steps(torch.ones_like(g), delta, -delta - extra, g * delta.sqrt())


@dataclass(frozen=True, slots=True)
class DanceSde:
    """DanceGRPO's SDE: a constant diffusion coefficient (Xue et al. 2025, arXiv:2505.07818).

    Attributes:
        eta: the coefficient g itself, >= 0; 0.3 on FLUX.
    """

    name: ClassVar[str] = "dance_sde"
    eta: float = 0.3

    def __call__(self, grid: FlowGrid) -> Steps:
        """The sampler's steps on a grid."""
        return flow_sde_steps(grid, torch.full_like(grid.sigma_next, self.eta))

    def deterministic(self, grid: FlowGrid) -> Steps:
        """The same sampler without noise."""
        return euler_steps(grid)


@dataclass(frozen=True, slots=True)
class FlowSde:
    """Flow-GRPO's SDE: g = a sqrt(sigma / (1 - sigma)) (Liu et al. 2025, arXiv:2505.05470).

    At sigma = 1 the denominator takes the grid's second sigma, as the official code does.

    Attributes:
        noise_level: `a`, >= 0; 0.7 on SD3.5.
    """

    name: ClassVar[str] = "flow_sde"
    noise_level: float = 0.7

    def __call__(self, grid: FlowGrid) -> Steps:
        """The sampler's steps on a grid."""
        sigma = grid.sigmas[:-1]
        below_one = torch.where(sigma == 1, grid.sigmas[1], sigma)
        return flow_sde_steps(grid, self.noise_level * (sigma / (1 - below_one)).sqrt())

    def deterministic(self, grid: FlowGrid) -> Steps:
        """The same sampler without noise."""
        return euler_steps(grid)


@dataclass(frozen=True, slots=True)
class Cps:
    """Coefficients-preserving sampling: the noise of the latent's own level is partly renewed.

    mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) eps, std = sigma_next sin(a pi / 2)
    (Wang and Yu 2025, arXiv:2509.05952; an option of Flow-GRPO).

    Attributes:
        noise_level: `a`, 0 (the ODE) to 1 (all noise renewed); 0.8 in Flow-GRPO.
    """

    name: ClassVar[str] = "cps"
    noise_level: float = 0.8

    def __call__(self, grid: FlowGrid) -> Steps:
        """The sampler's steps on a grid."""
        std = grid.sigma_next * math.sin(self.noise_level * math.pi / 2)
        kept = (grid.sigma_next**2 - std**2).clamp(min=0).sqrt()
        return Steps(torch.zeros_like(std), 1 - grid.sigma_next, kept, std)

    def deterministic(self, grid: FlowGrid) -> Steps:
        """The same sampler without noise."""
        return euler_steps(grid)


class Transition(Protocol):
    """A sampler: hyper-parameters in the fields, the steps of a grid by calling it."""

    name: ClassVar[str]

    def __call__(self, grid, /) -> Steps:
        """The sampler's steps on a grid."""
        ...

    def deterministic(self, grid, /) -> Steps:
        """The same sampler without noise."""
        ...
