"""The stochastic samplers of the method, as a function that ComfyUI's KSAMPLER object runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...pcpo import CREDITS, TRANSITIONS
from ...pcpo.credit import Native, Proportionate, Relative
from ...pcpo.plan import step_set
from ...pcpo.schedules import DiffusionGrid
from ...pcpo.transitions import DanceSde, Ddim, FlowSde, Steps, Transition
from ...registry import samplers
from ...trainers.families.spec import FamilySpec
from .. import host
from ..errors import NodeError
from ..families import spec_of_network
from .noise import stream_noise

AUTO = "auto"
PUBLISHED = -1.0
"""A noise level below 0 stands for the one that the sampler's paper uses."""

AS_TRAINED, AS_COMFYUI = "as trained", "as ComfyUI"
"""What an empty latent starts from, and what a schedule that ends above 0 gives."""

RELATIVE = Relative.name
SAMPLED = (Native.name, Proportionate.name, RELATIVE)
"""Kinds of credit that are sampled in a way of their own, and the native one."""

SCHEDULE_END = 1e-4
"""Relative distance at which a last sigma is the smallest of the model's schedule."""


@dataclass(frozen=True, slots=True)
class SdeSettings:
    """What PCPO SDE Sampler is set to.

    Attributes:
        transition: a key of `TRANSITIONS`, or `AUTO`.
        noise_level: of the transition; 0 is the ODE, below 0 the published one.
        credit: one of `SAMPLED`.
        ends: how the schedule's ends are treated, `AS_TRAINED` or `AS_COMFYUI`.
    """

    transition: str = AUTO
    noise_level: float = PUBLISHED
    credit: str = "native"
    ends: str = AS_TRAINED


@dataclass(frozen=True, slots=True)
class Walk:
    """A sampler on the way along given sigmas.

    Attributes:
        steps: it, in the method's scale.
        host: it, in ComfyUI's scale.
        scale: lambda of each step, by which a guider multiplies its gammas; None but for relative
            credit.
    """

    grid: host.Grid
    steps: Steps
    host: host.HostSteps
    scale: list[float] | None = None

    @property
    def policy(self) -> Bool[Tensor, " n"]:
        """The steps that carry noise."""
        return self.steps.std > 0


def transition_of(
    settings: SdeSettings, sampling: Any, spec: FamilySpec | None = None
) -> Transition:
    """The kind of sampler for a model of a known family or another, at its noise level."""
    family, name = host.family_of(sampling), settings.transition
    if name == AUTO:
        name = automatic(sampling, spec)
    fitting = samplers(is_flow=family != host.DIFFUSION)
    if name not in fitting:
        raise NodeError(
            f"transition '{name}' is not for a {family} MODEL; choose {' or '.join(fitting)}, "
            f"or '{AUTO}'"
        )
    limit, kind = TRANSITIONS.entries[name].most, TRANSITIONS[name]
    if settings.noise_level > limit:
        raise NodeError(
            f"noise_level is {settings.noise_level:g} and '{name}' goes up to {limit:g}; lower it"
        )
    return kind() if settings.noise_level < 0 else kind(settings.noise_level)


def automatic(sampling: Any, spec: FamilySpec | None = None) -> str:
    """DDPO's sampler for diffusion models, a flow model's family's, else DanceGRPO's where the
    schedule is FLUX's and Flow-GRPO's where not.
    """
    if host.family_of(sampling) == host.DIFFUSION:
        return Ddim.name
    if spec is not None and spec.is_flow:
        return spec.transition
    return DanceSde.name if host.is_flux(sampling) else FlowSde.name


def walk_of(
    settings: SdeSettings,
    sampling: Any,
    sigmas: Float[Tensor, " n_plus_1"],
    spec: FamilySpec | None = None,
) -> Walk:
    """Compile a sampler for a model, of a known family or another, and its sigmas.

    A step that arrives at sigma 0 is taken without noise: nothing would remove it again.
    """
    grid = host.grid_of(sampling, sigmas)
    transition = transition_of(settings, sampling, spec)
    quiet = transition.deterministic(grid)
    try:
        noisy, scale = _noisy_steps(settings, grid, transition)
    except ValueError as error:
        raise NodeError(
            f"{settings.credit} credit cannot be given along these sigmas: {error}"
        ) from error
    ends = sigmas[1:].cpu() == 0
    pairs = [(getattr(quiet, f.name), getattr(noisy, f.name)) for f in fields(Steps)]
    steps = Steps(*(torch.where(ends, still, moving) for still, moving in pairs))
    return Walk(grid, steps, host.host_steps(grid, steps, sigmas), scale)


def _noisy_steps(
    settings: SdeSettings, grid: host.Grid, transition: Transition
) -> tuple[Steps, list[float] | None]:
    """The sampler with its noise, and lambda of each step for relative credit."""
    native = transition.deterministic(grid) if settings.noise_level == 0 else transition(grid)
    if settings.credit == RELATIVE:
        return native, _scale(grid, transition)
    if settings.credit == Native.name:
        return native, None
    credit: Any = CREDITS[settings.credit]()
    return credit(grid, transition, step_set(len(grid.timesteps))).steps, None


def _scale(grid: host.Grid, transition: Transition) -> list[float]:
    """Lambda of each step; of DDPM's noise where the sampler has none."""
    if not isinstance(grid, DiffusionGrid):
        raise NodeError(
            "credit 'relative' is a reading of ddim, and this is a flow MODEL; choose native or "
            "proportionate"
        )
    kind = transition if getattr(transition, "eta", 1.0) > 0 else Ddim()
    return Relative()(grid, kind, step_set(len(grid.timesteps))).scale.tolist()


# --- the loop ------------------------------------------------------------------------------------


@torch.no_grad()
def sample_sde(
    model: Any,
    x: Float[Tensor, "b *d"],
    sigmas: Float[Tensor, " n_plus_1"],
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    settings: SdeSettings,
    images: Sequence[int] | None = None,
) -> Float[Tensor, "b *d"]:
    """Sample, as KSAMPLER calls it.

    Args:
        model: gives the clean estimate of (x, sigma); knows the batch's noise, latents and mask.
        x: what sampling starts from, in ComfyUI's scale.
        extra_args: for the model; its "seed" is that of the noise.
        callback: told of every step; shows previews and raises where the user interrupts.
        images: which image of its batch each one is; 0, 1, 2, ... where None.
    """
    from tqdm.auto import trange

    extra_args = extra_args or {}
    network = model.inner_model.inner_model
    walk = walk_of(settings, network.model_sampling, sigmas, spec_of_network(network))
    steps, count = walk.host, len(walk.host.push)
    told = _model_inputs(model.inner_model, walk, extra_args)
    noise = _draws(walk, x, extra_args.get("seed"), images)
    ones, is_method = x.new_ones(len(x)), _follows_the_method(settings, walk)
    if is_method and _is_empty(model, extra_args):
        x = _pure_noise(model.noise, sigmas[0])
    for i in trange(count, disable=disable):
        denoised = model(x, sigmas[i] * ones, **told[i])
        if callback is not None:
            known = {"sigma": sigmas[i], "sigma_hat": sigmas[i]}
            callback({"x": x, "i": i, "denoised": denoised} | known)
        x = steps.keep[i] * x + steps.pull[i] * denoised
        if steps.push[i] > 0:
            x = x + steps.push[i] * noise[:, i + 1].to(x)
    return _final(model, x, sigmas[-1], extra_args) if is_method else x


def _model_inputs(guider: Any, walk: Walk, extra_args: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model is told at each step: for relative credit lambda too."""
    if walk.scale is None:
        return [extra_args] * len(walk.host.push)
    from ..guidance.guider import SCALE, ImplicitRewardGuider

    meaning = "credit 'relative' scales what a LoRA changes of its base"
    if not isinstance(guider, ImplicitRewardGuider):
        raise NodeError(
            f"{meaning}, which a {type(guider).__name__} does not know; sample with PCPO Implicit "
            "Reward Guider, given the base and, from PCPO Tuned LoRA with gamma 1, the LoRA"
        )
    if not guider.tuned:
        raise NodeError(
            f"{meaning}, and every tuned model of this PCPO Implicit Reward Guider has gamma 0; "
            "set it to 1 in PCPO Tuned LoRA"
        )
    options = extra_args.get("model_options", {})
    return [extra_args | {"model_options": options | {SCALE: scale}} for scale in walk.scale]


def _draws(
    walk: Walk, x: Float[Tensor, "b *d"], seed: int | None, images: Sequence[int] | None
) -> Float[Tensor, "b n_plus_1 *d"]:
    if not walk.policy.any():
        return torch.empty(len(x), 0)
    numbers = range(len(x)) if images is None else images
    return stream_noise(seed or 0, numbers, len(walk.policy), x.shape[1:])


def _follows_the_method(settings: SdeSettings, walk: Walk) -> bool:
    """Whether latents start and end in the method's scale; flow models have one scale only."""
    return settings.ends == AS_TRAINED and isinstance(walk.grid, DiffusionGrid)


def _is_empty(model: Any, extra_args: dict[str, Any]) -> bool:
    """Whether an image is made from noise alone; False where another pack's wrapper hides it."""
    latent = getattr(model, "latent_image", None)
    is_masked = extra_args.get("denoise_mask") is not None
    return latent is not None and not is_masked and not bool(latent.any())


def _pure_noise(noise: Float[Tensor, "b *d"], sigma: Float[Tensor, ""]) -> Float[Tensor, "b *d"]:
    """Noise of variance 1 in the method's scale, which training starts from at any sigma.

    ComfyUI does so at the schedule's largest sigma alone. Below it, it takes the empty latent for
    an image: the start then has a little less noise than the network has met there.
    """
    return noise * (1 + sigma**2).sqrt()


def _final(
    model: Any, x: Tensor, sigma: Float[Tensor, ""], extra_args: dict[str, Any]
) -> Float[Tensor, "b *d"]:
    """Where a schedule ends above 0, as the paper's do, the image is sqrt(alpha_bar) x.

    Sigmas that stop earlier than the model's schedule are the first part of a longer way.
    """
    smallest = float(model.inner_model.inner_model.model_sampling.sigma_min)
    if not 0 < float(sigma) <= smallest * (1 + SCHEDULE_END):
        return x
    x, mask = x / (1 + sigma**2).sqrt(), extra_args.get("denoise_mask")
    return x if mask is None else x * mask + model.latent_image * (1 - mask)
