"""The grids a sampler walks along: DDIM timesteps with their alpha-bars, and flow sigmas.

Everything is float64 on the CPU: a grid is a few dozen numbers, and the weights and standard
deviations made from it are converted once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

# --- diffusion -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DiffusionGrid:
    """The points of a DDIM sampler, from noise to image.

    Attributes:
        timesteps: the network's input, integers in [0, 1000), descending.
        alpha_bar: the cumulative alpha at each step, in [0, 1].
        alpha_bar_next: the cumulative alpha the step arrives at: the sampler's own next point.
    """

    timesteps: Float64[Tensor, " n"]
    alpha_bar: Float64[Tensor, " n"]
    alpha_bar_next: Float64[Tensor, " n"]

    @property
    def levels(self) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """(signal, noise) of each step: x = signal x0 + noise eps."""
        return self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()

    @property
    def intervals(self) -> Float64[Tensor, " n"]:
        """Length of each step in timesteps; the last one's target is where the spacing leads.

        A grid has times only up to its last step. The step after it is taken to be as long as the
        one before, which is exact for the even grids and the rule for all others.
        """
        if len(self.timesteps) == 1:
            return torch.ones_like(self.timesteps)
        steps = self.timesteps[:-1] - self.timesteps[1:]
        return torch.cat([steps, steps[-1:]])


def scaled_linear_alpha_bars(
    beta_start: float = 0.00085, beta_end: float = 0.012, num: int = 1000
) -> Float64[Tensor, " num"]:
    """The schedule of Stable Diffusion: betas linear in their square root.

    Args:
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in (0, 1).
        num: number of training timesteps.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


def linear_alpha_bars(
    beta_start: float = 1e-4, beta_end: float = 0.02, num: int = 1000
) -> Float64[Tensor, " num"]:
    """The schedule of DDPM (Ho et al. 2020): betas linear.

    Args:
        beta_start: first beta, in (0, 1).
        beta_end: last beta, in (0, 1).
        num: number of training timesteps.
    """
    return torch.cumprod(1 - torch.linspace(beta_start, beta_end, num, dtype=torch.float64), dim=0)


def zero_terminal_snr(alpha_bars: Float64[Tensor, " num"]) -> Float64[Tensor, " num"]:
    """Shift and scale sqrt(alpha_bar) so that the last is 0 and the first is kept.

    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
    algorithm 1.

    >>> zero_terminal_snr(torch.tensor([0.81, 0.25, 0.01], dtype=torch.float64))
    tensor([0.8100, 0.2025, 0.0000], dtype=torch.float64)
    """
    root = alpha_bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def leading(num_steps: int, num_train: int, offset: int) -> Tensor:
    """Evenly from `offset` upwards: 981, 961, ..., 1 for 50 of 1000 with offset 1 (DDPO, SD)."""
    return torch.arange(num_steps).flip(0) * (num_train // num_steps) + offset


def trailing(num_steps: int, num_train: int, offset: int) -> Tensor:
    """Evenly from the last timestep downwards: 999, 979, ..., 19 for 50 of 1000."""
    points = np.arange(num_train, 0, -num_train / num_steps)[:num_steps]
    return torch.from_numpy(points.round()).long() - 1


def linspace(num_steps: int, num_train: int, offset: int) -> Tensor:
    """From the last timestep to 0, both included, rounded: 999, 979, ..., 0 for 50 of 1000."""
    # numpy's points, as diffusers has them: torch's differ in the last bit, which decides ties
    points = np.linspace(0, num_train - 1, num_steps)
    return torch.from_numpy(points.round()).long().flip(0)


SPACINGS: dict[str, Callable[[int, int, int], Tensor]] = {
    f.__name__: f for f in (leading, trailing, linspace)
}


def ddim_grid(
    num_steps: int,
    alpha_bars: Float64[Tensor, " num"] | None = None,
    *,
    spacing: str = "leading",
    steps_offset: int = 1,
    final_alpha_bar: float | None = None,
) -> DiffusionGrid:
    """The points of a DDIM sampler.

    >>> ddim_grid(5).timesteps.int().tolist()
    [801, 601, 401, 201, 1]

    Args:
        num_steps: steps of the sampler, 1 to the number of training timesteps.
        alpha_bars: cumulative alphas of the training schedule; SD's if None.
        spacing: a key of `SPACINGS`.
        steps_offset: added to every timestep; used by "leading" alone (1 for SD).
        final_alpha_bar: alpha-bar after the last step; the schedule's first if None (SD and DDPO),
            1 for a last step without noise.

    Raises:
        ValueError: for an unknown spacing or a number of steps out of range.
    """
    alpha_bars = scaled_linear_alpha_bars() if alpha_bars is None else alpha_bars.double()
    num_train = len(alpha_bars)
    if spacing not in SPACINGS:
        raise ValueError(f"there is no spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if not 1 <= num_steps <= num_train:
        raise ValueError(f"num_steps is {num_steps}; it must lie in 1 to {num_train}")
    timesteps = SPACINGS[spacing](num_steps, num_train, steps_offset).clamp(0, num_train - 1)
    alpha_bar = alpha_bars[timesteps]
    final = alpha_bars[0] if final_alpha_bar is None else alpha_bars.new_tensor(final_alpha_bar)
    return DiffusionGrid(timesteps.double(), alpha_bar, torch.cat([alpha_bar[1:], final[None]]))


# --- flow ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlowGrid:
    """The points of a flow sampler: sigma, the share of noise, from 1 (noise) down to 0 (image).

    x = (1 - sigma) x0 + sigma eps, velocity = dx / dsigma = eps - x0.

    Attributes:
        sigmas: strictly descending, in [0, 1]; one more than there are steps.
    """

    sigmas: Float64[Tensor, " n_plus_1"]

    @property
    def timesteps(self) -> Float64[Tensor, " n"]:
        """Sigma at the start of each step; families scale it to what their network expects."""
        return self.sigmas[:-1]

    @property
    def levels(self) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """(signal, noise) of each step: x = signal x0 + noise eps."""
        return 1 - self.timesteps, self.timesteps

    @property
    def sigma_next(self) -> Float64[Tensor, " n"]:
        """Sigma at the end of each step."""
        return self.sigmas[1:]

    @property
    def intervals(self) -> Float64[Tensor, " n"]:
        """Delta = sigma - sigma_next > 0; sums to 1 on a full grid."""
        return self.sigmas[:-1] - self.sigmas[1:]


def shift_sigmas(sigmas: Float64[Tensor, "*s"], shift: float) -> Float64[Tensor, "*s"]:
    """Move sigmas towards noise: shift s / (1 + (shift - 1) s) (Esser et al. 2024, SD3, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_shift(
    num_tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_mu: float = 0.5,
    max_mu: float = 1.15,
) -> float:
    """FLUX's shift for a number of latent tokens: exp(mu), mu linear in the tokens.

    >>> round(resolution_shift(1024), 3), round(resolution_shift(4096), 3)
    (1.878, 3.158)

    Args:
        num_tokens: tokens of the packed latent, (height / 16) (width / 16) for FLUX.
        base_tokens: tokens at which mu is `base_mu`.
        max_tokens: tokens at which mu is `max_mu`.
        base_mu: mu at `base_tokens`.
        max_mu: mu at `max_tokens`.

    Returns:
        The shift, for `flow_grid`.
    """
    slope = (max_mu - base_mu) / (max_tokens - base_tokens)
    return math.exp(base_mu + slope * (num_tokens - base_tokens))


def empirical_shift(num_tokens: int, num_steps: int) -> float:
    """FLUX.2's shift exp(mu): mu is linear in the tokens at 10 and at 200 steps, and between them.

    Source: diffusers' Flux2KleinPipeline, `compute_empirical_mu`; ComfyUI's Flux2Scheduler.

    >>> round(empirical_shift(1024, 4), 3), round(empirical_shift(4096, 50), 3)
    (7.619, 7.564)

    Args:
        num_tokens: of the image, squares of 16 x 16 pixels; beyond 4300 the steps do not matter.
        num_steps: of the sampler.

    Returns:
        The shift, for `flow_grid`.
    """
    at_200 = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return math.exp(at_200)
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    return math.exp(at_200 + (at_200 - at_10) / 190 * (num_steps - 200))


def uniform_sigmas(num_steps: int, shift: float, num_train: int) -> Float64[Tensor, " n"]:
    """DanceGRPO's grid before its 0: linspace(1, 0, n + 1), shifted."""
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)[:-1]


def flow_match_euler_sigmas(num_steps: int, shift: float, num_train: int) -> Float64[Tensor, " n"]:
    """diffusers' FlowMatchEuler grid with a static shift, before its 0 (Flow-GRPO on SD3.5).

    The scheduler shifts twice: its smallest training sigma is already shifted once, and the
    evenly spaced points that end there are shifted again.
    """
    smallest = shift_sigmas(torch.tensor(1 / num_train, dtype=torch.float64), shift)
    even = torch.linspace(1, float(smallest), num_steps, dtype=torch.float64)
    return shift_sigmas(even, shift)


def inverse_count_sigmas(num_steps: int, shift: float, num_train: int) -> Float64[Tensor, " n"]:
    """The FLUX pipeline's grid before its 0: linspace(1, 1/n, n), shifted (Flow-GRPO on FLUX)."""
    return shift_sigmas(torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64), shift)


FLOW_GRIDS: dict[str, Callable[[int, float, int], Tensor]] = {
    "uniform": uniform_sigmas,
    "flow_match_euler": flow_match_euler_sigmas,
    "inverse_count": inverse_count_sigmas,
}


def flow_grid(
    num_steps: int, *, kind: str = "flow_match_euler", shift: float = 3.0, num_train: int = 1000
) -> FlowGrid:
    """The points of a flow sampler.

    >>> [round(s, 4) for s in flow_grid(4, kind="uniform").sigmas.tolist()]
    [1.0, 0.9, 0.75, 0.5, 0.0]

    Args:
        num_steps: steps of the sampler, >= 1.
        kind: a key of `FLOW_GRIDS`.
        shift: static shift > 0; 3 for SD3.5 and DanceGRPO, `resolution_shift` for FLUX.
        num_train: training timesteps of the scheduler; read by "flow_match_euler" alone.

    Returns:
        The grid, ending in 0.

    Raises:
        ValueError: for an unknown kind, no steps, or a shift that is not positive.
    """
    if kind not in FLOW_GRIDS:
        raise ValueError(f"there is no flow grid {kind!r}; choose one of {', '.join(FLOW_GRIDS)}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive (1 leaves the grid as it is)")
    sigmas = FLOW_GRIDS[kind](num_steps, shift, num_train)
    return FlowGrid(torch.cat([sigmas, sigmas.new_zeros(1)]))
