"""What ComfyUI's MODEL says of noise, in the method's terms.

ComfyUI keeps the latents of diffusion models in the scale x = x0 + sigma eps ("VE"), the method in
x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps ("VP"): alpha_bar = 1 / (1 + sigma^2), and a VP
latent is sqrt(alpha_bar) times a VE one. For flow models both agree, and a sigma is the share of
noise with the model's shift in it already.

A MODEL's `model_sampling` object is called `sampling` here. ComfyUI puts its class together from a
schedule and a prediction; it is told by their names, so that nothing of ComfyUI is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..pcpo.predictions import PREDICTIONS
from ..pcpo.schedules import DiffusionGrid, FlowGrid
from ..pcpo.transitions import Steps
from .errors import NodeError

DIFFUSION, FLOW = "diffusion", "flow"

PURE_NOISE = 1 - 1e-5
"""Flow sigmas from here on are 1: schedules computed in float32 miss it by a rounding."""

ZERO_SNR = 1e-7
"""Below it alpha_bar is 0: of a schedule with zero terminal SNR, which ComfyUI begins at 4.9e-8."""

ABOVE = 1e-3
"""Relative excess over the model's largest sigma that is put down to rounding."""

Grid = DiffusionGrid | FlowGrid


def sampling_of(model: Any) -> Any:
    """The `model_sampling` of a MODEL, or what a node such as ModelSamplingSD3 put in its place."""
    return model.get_model_object("model_sampling")


def family_of(sampling: Any) -> str:
    """Whether a model is trained on diffusion or on flow matching.

    Returns:
        `DIFFUSION` (noise, v and clean-sample prediction) or `FLOW`.
    """
    kinds = _prediction_kinds(sampling)
    if not kinds & {"IMG_TO_IMG", "IMG_TO_IMG_FLOW"}:
        if "EPS" in kinds:
            return DIFFUSION
        if "CONST" in kinds and getattr(sampling, "noise_scale", 1.0) == 1:
            return FLOW
    names = ", ".join(kind.__name__ for kind in type(sampling).__mro__[1:3])
    raise NodeError(
        f"this MODEL samples in a way PCPO does not know ({names}); connect a diffusion model "
        "(noise or v prediction) or a flow model such as SD3 or FLUX"
    )


def is_flux(sampling: Any) -> bool:
    """Whether the schedule is FLUX's, whose `shift` is the logarithm of the others'."""
    return "ModelSamplingFlux" in _prediction_kinds(sampling)


def is_v_prediction(sampling: Any) -> bool:
    """Whether a network predicts v, on a table of timesteps (which EDM's have not)."""
    return _prediction_kinds(sampling) >= {"ModelSamplingDiscrete", "V_PREDICTION"}


def shift_of(sampling: Any) -> float:
    """The shift of a flow model's schedule, as `pcpo.schedules.flow_grid` takes it.

    Returns:
        The factor, > 0; 1 leaves sigmas as they are.
    """
    shift = getattr(sampling, "shift", None)
    if family_of(sampling) != FLOW or shift is None:
        raise NodeError("this MODEL has no shift of its own; use ComfyUI's Basic Scheduler")
    return math.exp(float(shift)) if is_flux(sampling) else float(shift)


def alpha_bars_of(sampling: Any) -> Float64[Tensor, " num"]:
    """The cumulative alphas of a diffusion model's training schedule, decreasing, on the CPU."""
    return _alpha_bar(sampling.sigmas.cpu().double())


def grid_of(sampling: Any, sigmas: Float[Tensor, " n_plus_1"]) -> Grid:
    """The points of a sampler, as the method knows them.

    Args:
        sigmas: ComfyUI's, in the model's own range, strictly descending.

    Returns:
        The grid. A diffusion model's timesteps are read off its schedule and need not be whole;
        pure noise has alpha_bar 0, as in training.
    """
    family = family_of(sampling)
    points = sigmas.detach().cpu().double()
    _check(points, 1.0 if family == FLOW else float(sampling.sigma_max), family)
    if family == FLOW:
        return FlowGrid(torch.where(points > PURE_NOISE, 1.0, points))
    start, end = _alpha_bar(points[:-1]), _alpha_bar(points[1:])
    start = torch.where(start < ZERO_SNR, 0.0, start)
    return DiffusionGrid(_timesteps(sampling, points[:-1]), start, end)


def ends_in_noise(sampling: Any) -> bool:
    """Whether a diffusion model's schedule ends in pure noise (zero terminal SNR)."""
    return float(alpha_bars_of(sampling)[-1]) < ZERO_SNR


@dataclass(frozen=True, slots=True)
class HostSteps:
    """A sampler in ComfyUI's scale, one number a step: x_next = keep x + pull x0 + push z.

    Attributes:
        pull: coefficient of the clean estimate, which ComfyUI calls denoised.
        push: standard deviation of the noise, >= 0.
    """

    keep: list[float]
    pull: list[float]
    push: list[float]


def host_steps(grid: Grid, steps: Steps, sigmas: Float[Tensor, " n_plus_1"]) -> HostSteps:
    """Turn a sampler's steps into what a loop over ComfyUI's denoised estimates does.

    Args:
        steps: it, in the method's scale.
        sigmas: ComfyUI's, of which the grid was made; they hold ComfyUI's scale.

    Returns:
        Its coefficients, computed in float64.
    """
    mean_x, mean_x0 = steps.in_terms_of(PREDICTIONS["sample"](*grid.levels))
    into, out = torch.ones_like(mean_x), torch.ones_like(mean_x)
    if isinstance(grid, DiffusionGrid):
        signal = signal_of(sigmas)
        into, out = signal[:-1], signal[1:]
    columns = (mean_x * into / out, mean_x0 / out, steps.std / out)
    return HostSteps(*(column.tolist() for column in columns))


def signal_of(sigmas: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """What takes a diffusion model's latents from ComfyUI's scale to the method's."""
    return _alpha_bar(sigmas.detach().cpu().double()).sqrt()


def _prediction_kinds(sampling: Any) -> set[str]:
    return {kind.__name__ for kind in type(sampling).__mro__}


def _alpha_bar(sigmas: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    return 1 / (1 + sigmas**2)


def _timesteps(sampling: Any, sigmas: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Where sigmas > 0 stand in the training schedule, log sigma being linear between points."""
    table, at = sampling.sigmas.cpu().double().log(), sigmas.log()
    right = torch.searchsorted(table, at).clamp(1, len(table) - 1)
    left = table[right - 1]
    share = (at - left) / (table[right] - left)
    return (right - 1 + share).clamp(0, len(table) - 1)


def _check(points: Float64[Tensor, " n_plus_1"], largest: float, family: str) -> None:
    shown = ", ".join(f"{sigma:.4g}" for sigma in points[:4].tolist())
    if len(points) < 2:
        raise NodeError(
            f"SIGMAS hold {len(points)} values, which make no step; give the sampler at least two"
        )
    if not bool((points[:-1] > points[1:]).all()) or points[-1] < 0:
        raise NodeError(
            f"SIGMAS begin {shown} and do not fall from each step to the next; use a scheduler "
            "that gives descending sigmas, such as PCPO Scheduler"
        )
    if points[0] > largest * (1 + ABOVE):
        raise NodeError(
            f"SIGMAS begin at {points[0]:.4g} and this {family} MODEL knows noise up to "
            f"{largest:.4g}; make them with a scheduler that is connected to the same MODEL"
        )


def num_patches(patcher: Any) -> int:
    """How many changes of weights are on a part."""
    return sum(len(patches) for patches in patcher.patches.values())
