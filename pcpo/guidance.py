"""Combine predictions of one latent: with and without the prompt, of several networks."""

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


def shared_negative(
    conditional: Prediction, base_conditional: Prediction, base_unconditional: Prediction
) -> Prediction:
    """A tuned network's unconditional prediction, derived from the base's instead of predicted.

    This assumes that tuning changes both predictions alike. Implicit Reward Guidance then is the
    base's guided prediction + sum_i gamma_i (conditional_i - conditional_ref): exact at scale 1;
    else it omits (scale - 1) times what tuning changes of the difference between the two.

    Args:
        conditional: the tuned network's.
        base_conditional: the base's.
        base_unconditional: the base's with the negative prompt.

    Returns:
        base_unconditional + conditional - base_conditional.
    """
    return base_unconditional + (conditional - base_conditional)


def implicit_reward(
    reference: Prediction, tuned: Sequence[Prediction], gammas: Sequence[float | Tensor]
) -> Prediction:
    """Implicit Reward Guidance over one or several tuned networks (paper Appendix F).

    eps = eps_ref + sum_i gamma_i (eps_i - eps_ref), each prediction classifier-free-guided
    already. Use the result for the clean estimate AND for renoising.

    Args:
        reference: the base network's prediction (velocity for flow).
        tuned: the tuned networks' predictions.
        gammas: one per network, or a tensor that broadcasts over its latents; 0 is the base, 1 the
            tuned network, above 1 extrapolates.

    Raises:
        ValueError: if the numbers of networks and gammas differ.
    """
    if len(tuned) != len(gammas):
        raise ValueError(f"{len(tuned)} tuned predictions but {len(gammas)} gammas; give one each")
    guided = reference
    for prediction, gamma in zip(tuned, gammas, strict=True):
        guided = guided + gamma * (prediction - reference)
    return guided
