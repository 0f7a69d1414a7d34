"""The sampler's loop: from a denoiser and a plan to a Trajectory, or to gradients on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .plan import Plan
from .ratios import StepBatch
from .trajectory import Trajectory

Denoiser = Callable[[Float[Tensor, "b *d"], Float[Tensor, ""]], Float[Tensor, "b *d"]]
Callback = Callable[[int, Tensor, Tensor], None]
Learn = Callable[[int, Tensor, StepBatch, Tensor | None], None]


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by a tuple, such as (seed, iteration, prompt index, image index).

    Distinct tuples give independent streams on every machine.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def noise_streams(
    keys: Sequence[tuple[int | str, ...]], num_steps: int, shape: Sequence[int]
) -> Float[Tensor, "b n_plus_1 *d"]:
    """All the noise of a batch, each image from a stream of its own.

    So an image's noise depends on its key alone: not on its batch, nor on the number of processes.

    Args:
        keys: one tuple per image.
        num_steps: steps of the sampler; entry 0 is the initial noise.
        shape: one latent's shape.

    Returns:
        Standard normal noise, float32 on the CPU.
    """
    draws = [torch.randn(num_steps + 1, *shape, generator=generator_for(*key)) for key in keys]
    return torch.stack(draws)


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    plan: Plan,
    noise: Float[Tensor, "b n_plus_1 *d"],
    *,
    reference: Denoiser | None = None,
    untrained: Denoiser | None = None,
    storage: torch.dtype = torch.float32,
    round_before_use: bool = True,
    callback: Callback | None = None,
) -> Trajectory:
    """Sample a batch and keep what the update needs (paper Eq. 4 and 7).

    Args:
        denoiser: (latent, timestep) -> prediction, guided already; float32 or better.
        plan: the sampler, on the noise's device.
        noise: initial noise and one draw per step, from `noise_streams`.
        reference: the frozen policy's denoiser, if its predictions are wanted.
        untrained: the policy's denoiser at the steps that the plan does not train, where it may
            round differently; `denoiser` if None.
        storage: dtype in which latents and noise are kept.
        round_before_use: whether to round a latent to `storage` BEFORE the network sees it, so that
            the update sees the same; False repeats the baselines' fault (a ratio that is not 1 on
            policy).
        callback: called with (step, latent after it, clean estimate), for previews.

    Returns:
        The trajectories at the steps the plan trains; their predictions are the policy's.
    """
    kept: dict[str, list[Tensor]] = {"x": [], "prediction": [], "noise": [], "reference": []}
    trained, others = plan.trained.tolist(), untrained or denoiser
    compared = trained if plan.compared is None else plan.compared.tolist()

    def predict(i: int, x: Tensor, draw: Tensor) -> Tensor:
        network, frozen = (denoiser if trained[i] else others)(x, plan.timesteps[i]), None
        if reference is not None and (compared[i] or plan.scale is not None):
            frozen = reference(x, plan.timesteps[i])
        prediction = plan.policy(i, network, frozen)
        if trained[i]:
            kept["x"].append(x.to(storage))
            kept["prediction"].append(prediction)
            kept["noise"].append(draw.to(storage))
            if reference is not None:  # the prediction of a step without KL is any number
                kept["reference"].append(torch.zeros_like(x) if frozen is None else frozen)
        return prediction

    final, clean = _walk(predict, plan, noise, storage if round_before_use else None, callback)
    columns = {k: torch.stack(rows, dim=1) for k, rows in kept.items() if rows}
    nothing = noise[:, :0]
    return Trajectory(
        step=plan.trained.nonzero().flatten(),
        x=columns.get("x", nothing),
        prediction=columns.get("prediction", nothing),
        noise=columns.get("noise", nothing),
        final=final,
        clean=clean,
        reference=columns.get("reference"),
    )


@torch.no_grad()
def rollout_with_gradient(
    denoiser: Denoiser,
    plan: Plan,
    noise: Float[Tensor, "b n_plus_1 *d"],
    learn: Learn,
    learned: Sequence[int],
    *,
    reference: Denoiser | None = None,
    untrained: Denoiser | None = None,
    storage: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
    """Sample the same batch, to the bit, and learn from each step's forward pass at once.

    On policy the update's forward pass is the rollout's. Only what `learn` keeps is kept.

    Args:
        denoiser: as for `rollout`; it runs with gradient at the steps to learn.
        plan: the sampler, on the noise's device.
        noise: initial noise and one draw per step.
        learn: called with (step, policy's prediction with its graph, a log ratio's inputs for the
            step, with the prediction itself as the old one, and the reference's prediction or
                None).
        learned: steps to learn; each carries a policy.
        reference: the frozen policy's denoiser, if its predictions are wanted.
        untrained: as for `rollout`.
        storage: dtype to which a latent is rounded before the network sees it.
        callback: called with (step, latent after it, clean estimate).

    Returns:
        The latents after the last step, and the last clean estimates.
    """
    wanted, trained, others = frozenset(learned), plan.trained.tolist(), untrained or denoiser
    compared = trained if plan.compared is None else plan.compared.tolist()

    def predict(i: int, x: Tensor, draw: Tensor) -> Tensor:
        time, frozen = plan.timesteps[i], None
        if reference is not None and ((i in wanted and compared[i]) or plan.scale is not None):
            frozen = reference(x, time)
        if i not in wanted:
            return plan.policy(i, (denoiser if trained[i] else others)(x, time), frozen)
        with torch.enable_grad():
            prediction = plan.policy(i, denoiser(x, time), frozen)
            learn(i, prediction, plan.step_batch(i, x, prediction.detach(), draw), frozen)
        return prediction.detach()

    return _walk(predict, plan, noise, storage, callback)


def _walk(
    predict: Callable[[int, Tensor, Tensor], Tensor],
    plan: Plan,
    noise: Tensor,
    rounding: torch.dtype | None,
    callback: Callback | None,
) -> tuple[Tensor, Tensor]:
    """The sampler's steps, from noise to image: `predict` is called with step, latent and noise."""
    rounded = (lambda t: t) if rounding is None else (lambda t: t.to(rounding).to(t.dtype))
    x = clean = rounded(noise[:, 0])
    for i in range(len(plan)):
        draw = rounded(noise[:, i + 1])
        prediction = predict(i, x, draw)
        clean = plan.x0_x[i] * x + plan.x0_p[i] * prediction
        x = rounded(plan.mean_x[i] * x + plan.mean_p[i] * prediction + plan.std[i] * draw)
        if callback is not None:
            callback(i, x, clean)
    return x, clean
