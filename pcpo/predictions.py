"""What a network predicts, as linear maps.

Whatever a network predicts, the clean estimate and the noise estimate are linear in the noisy
latent and the prediction:

    x0 = x0_x x + x0_p prediction,    eps = eps_x x + eps_p prediction.

A sampler is then written once, in terms of x0 and eps. At the ends of the noise scale a
coefficient may be infinite (an eps-network cannot say what x0 is in pure noise); the maps are
returned as they are and `plan` refuses a step that needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

Table = Float64[Tensor, " n"]


@dataclass(frozen=True, slots=True)
class Estimates:
    """Coefficients, one row per step, of the clean estimate and of the noise estimate."""

    x0_x: Table
    x0_p: Table
    eps_x: Table
    eps_p: Table


def epsilon(signal: Table, noise: Table) -> Estimates:
    """The network predicts the noise: x0 = (x - noise eps) / signal."""
    return Estimates(1 / signal, -noise / signal, torch.zeros_like(noise), torch.ones_like(noise))


def sample(signal: Table, noise: Table) -> Estimates:
    """The network predicts the clean sample: eps = (x - signal x0) / noise."""
    return Estimates(torch.zeros_like(noise), torch.ones_like(noise), 1 / noise, -signal / noise)


def v_prediction(signal: Table, noise: Table) -> Estimates:
    """The network predicts v = signal eps - noise x0 (Salimans and Ho 2022); finite everywhere."""
    return Estimates(signal, -noise, noise, signal)


def velocity(signal: Table, noise: Table) -> Estimates:
    """The network predicts the flow velocity eps - x0, with signal + noise = 1."""
    return Estimates(torch.ones_like(noise), -noise, torch.ones_like(noise), signal)


PREDICTIONS: dict[str, Callable[[Table, Table], Estimates]] = {
    f.__name__: f for f in (epsilon, sample, v_prediction, velocity)
}
