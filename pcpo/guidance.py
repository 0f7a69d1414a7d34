"""Combining predictions of one latent: with and without the prompt, of several networks."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

Prediction = Float[Tensor, "b *d"]


def classifier_free(conditional: Prediction, unconditional: Prediction, scale: float) -> Prediction:
    """Classifier-free guidance (Ho and Salimans 2022), diffusers' convention.

    Args:
        conditional: prediction with the prompt.
        unconditional: prediction with the negative prompt.
        scale: 1 is the conditional prediction alone, above 1 extrapolates.

    Returns:
        unconditional + scale (conditional - unconditional).
    """
    return unconditional + scale * (conditional - unconditional)


def implicit_reward(
    reference: Prediction, tuned: Sequence[Prediction], gammas: Sequence[float]
) -> Prediction:
    """Implicit Reward Guidance over one or several tuned networks (paper Appendix F).

    eps = eps_ref + sum_i gamma_i (eps_i - eps_ref), each prediction classifier-free-guided
    already. The result serves for the clean estimate AND for renoising.

    Args:
        reference: the base network's prediction (velocity for flow).
        tuned: the tuned networks' predictions.
        gammas: one a network; 0 the base, 1 the tuned network, above 1 extrapolates.

    Returns:
        The guided prediction.

    Raises:
        ValueError: where the numbers of networks and gammas differ.
    """
    if len(tuned) != len(gammas):
        raise ValueError(f"{len(tuned)} tuned predictions but {len(gammas)} gammas; give one each")
    guided = reference
    for prediction, gamma in zip(tuned, gammas, strict=True):
        guided = guided + gamma * (prediction - reference)
    return guided
