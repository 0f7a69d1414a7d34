"""log rho = log pi_new(x_next | x) - log pi_old(x_next | x) of one step, and KL divergences.

Per-step coefficients are one number per row (b,), already gathered from the plan. All arithmetic
is at least float32, whatever the network computed in. Results are the MEAN over a latent's
elements, (b,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b *d"]
Rows = Float[Tensor, " b"]


def rows_to(rows: Rows, like: Latents) -> Tensor:
    """One number per row, shaped to multiply a latent."""
    return rows.reshape(-1, *(1 for _ in like.shape[1:]))


def mean_of_elements(x: Latents) -> Rows:
    """The mean over everything but the batch."""
    return x.flatten(1).mean(dim=1)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """(image, step) pairs of a trajectory with their rows of the plan: the inputs of a log ratio.

    Attributes:
        x: the latent the step started from.
        old: the old network's prediction.
        noise: the noise that was drawn.
        mean_x: the plan's coefficient of the latent.
        mean_p: the plan's coefficient of the prediction.
        std: the step's standard deviation, > 0.
        credit: the weight of epsilon matching, in units of the prediction.
    """

    x: Latents
    old: Latents
    noise: Latents
    mean_x: Rows
    mean_p: Rows
    std: Rows
    credit: Rows


def weighted_log_ratio(prediction: Latents, old: Latents, noise: Latents, weight: Rows) -> Rows:
    """log rho without a density (paper Eq. 5; Prop. 1 and 2), exact at the native weight.

    log rho = -(w <pred - pred_old, eps_old> + 1/2 ||w (pred - pred_old)||^2).

    >>> new, old = torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    >>> weighted_log_ratio(new, old, torch.ones(1, 1, 2), torch.tensor([0.5]))
    tensor([0.3750])

    Args:
        prediction: the network's prediction now.
        old: its prediction when the step was sampled.
        noise: the noise that was drawn, standard normal.
        weight: w, in units of the prediction.

    Returns:
        log rho, mean over elements; exactly 0 where `prediction` equals `old`.
    """
    moved = rows_to(weight, old) * _difference(prediction, old)
    return -mean_of_elements(moved * noise + 0.5 * moved**2)


def gaussian_log_prob(x: Latents, mean: Latents, std: Rows) -> Rows:
    """Log-density of N(mean, std^2), mean over elements (DDPO's and Flow-GRPO's convention)."""
    scaled = (x - mean) / rows_to(std, x)
    return -mean_of_elements(scaled**2) / 2 - std.log() - 0.5 * math.log(2 * math.pi)


def epsilon_matching(prediction: Latents, step: StepBatch) -> Rows:
    """PCPO's ratio: `weighted_log_ratio` at the step's credit."""
    return weighted_log_ratio(prediction, step.old, step.noise, step.credit)


def density(prediction: Latents, step: StepBatch) -> Rows:
    """The baselines' ratio: the difference of two Gaussian log-densities of the same x_next."""
    x_next, old_mean, mean = _means(prediction, step)
    return gaussian_log_prob(x_next, mean, step.std) - gaussian_log_prob(x_next, old_mean, step.std)


def squared_error(prediction: Latents, step: StepBatch) -> Rows:
    """Flow-GRPO's stand-in for a density under CPS: -mean (x_next - mean)^2, no 1 / (2 std^2)."""
    x_next, old_mean, mean = _means(prediction, step)
    return mean_of_elements((x_next - old_mean) ** 2) - mean_of_elements((x_next - mean) ** 2)


def guard(prediction: Latents, step: StepBatch) -> Rows:
    """GRPO-Guard's normalised ratio (Wang et al. 2025, arXiv:2510.22319, Eq. 8).

    log rho = (log pi_new - log pi_old) std + mean (mean_new - mean_old)^2 / (2 std), which is 0 on
    average over the noise and not divided by the step's std. The squares of the two terms cancel,
    and the rest is computed: <mean_new - mean_old, eps_old>, mean over elements.

    >>> rows = [torch.tensor([value]) for value in (1.0, -0.5, 0.1, 0.0)]
    >>> x, old, noise = torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([[1.0, 3.0]])
    >>> guard(torch.zeros(1, 2), StepBatch(x, old, noise, *rows))
    tensor([1.])

    Args:
        prediction: the network's prediction now.
        step: the step from which, and around which mean, the next latent was drawn.

    Returns:
        log rho; exactly 0 where the prediction equals the old one.
    """
    moved = rows_to(step.mean_p, step.old) * _difference(prediction, step.old)
    return mean_of_elements(moved * step.noise)


def kl_divergence(prediction: Latents, reference: Latents, weight: Rows) -> Rows:
    """KL of the step's Gaussian from the reference policy's, ||mean - mean_ref||^2 / (2 std^2).

    Equal to 1/2 ||w (pred - pred_ref)||^2 with the NATIVE weight w (METHOD M6).

    Args:
        prediction: the network's prediction.
        reference: the frozen network's.
        weight: native weight of the step, in units of the prediction.

    Returns:
        The divergence, mean over elements, >= 0.
    """
    return 0.5 * mean_of_elements(
        (rows_to(weight, reference) * _difference(prediction, reference)) ** 2
    )


def kl_exact(prediction: Latents, reference: Latents, weight: Rows, interval: Rows) -> Rows:
    """The true divergence of the step; the interval is not used."""
    return kl_divergence(prediction, reference, weight)


def kl_without_interval(
    prediction: Latents, reference: Latents, weight: Rows, interval: Rows
) -> Rows:
    """Flow-GRPO's term, whose variance is g^2 instead of g^2 Delta: Delta times the true one."""
    return interval * kl_divergence(prediction, reference, weight)


def _difference(prediction: Latents, old: Latents) -> Latents:
    """Both at least float32 before they are subtracted."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, old.dtype), torch.float32)
    return prediction.to(dtype) - old.to(dtype)


def _means(prediction: Latents, step: StepBatch) -> tuple[Latents, Latents, Latents]:
    """The sampled x_next, the old mean it was drawn around, and the mean now."""
    from_x = rows_to(step.mean_x, step.x) * step.x
    old_mean = from_x + rows_to(step.mean_p, step.x) * step.old
    mean = from_x + rows_to(step.mean_p, step.x) * prediction
    return old_mean + rows_to(step.std, step.x) * step.noise, old_mean, mean
