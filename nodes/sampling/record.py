"""What a sampling leaves behind, step by step: the TRAJECTORY socket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ...pcpo import Trajectory
from ...pcpo.schedules import DiffusionGrid
from ..errors import NodeError
from ..families import spec_of_network
from ..host import sampling_of, signal_of
from .noise import stream_noise
from .sde import SdeSettings, Walk, sample_sde, walk_of

KEPT = torch.float16
"""Dtype of what is kept: it is looked at, and cached by ComfyUI for as long as a graph is open."""

Shown = Callable[[int, Tensor, Tensor, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class SampledTrajectory:
    """The way of a batch from noise to image; all on the CPU, latents in float16.

    Attributes:
        sigmas: at the start of each step, and where the last one arrives.
        clean: the clean estimate of each step, as VAE Decode takes latents.
        policy: of a PCPO sampler: what it had at the steps with noise, in the method's scale, the
            prediction being eps for diffusion and the velocity for flow; None for other samplers.
    """

    sigmas: Float64[Tensor, " n_plus_1"]
    clean: Float[Tensor, "b n *d"]
    policy: Trajectory | None

    def __len__(self) -> int:
        return len(self.clean)


@dataclass(slots=True)
class Recorder:
    """A callback that keeps what it is told of a sampling and passes it on.

    Attributes:
        shown: the callback that draws previews and raises where the user interrupts.
        sigmas: of the sampling, on the CPU.
        last: the last clean estimate, as precise as it came.
    """

    shown: Shown
    sigmas: Float64[Tensor, " n_plus_1"]
    walk: Walk | None
    clean: list[Tensor] = field(default_factory=list)
    x: list[Tensor] = field(default_factory=list)
    prediction: list[Tensor] = field(default_factory=list)
    last: Tensor = field(default_factory=lambda: torch.empty(0))

    def __call__(self, step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        """Keep a step, then show it.

        Args:
            step: from 0.
            x: the latent it starts from, in ComfyUI's scale.
        """
        self.last = denoised
        self.clean.append(denoised.to("cpu", KEPT))
        if self.walk is not None and self.walk.policy[step]:
            self.x.append((x * self._signal(self.walk)[step]).to("cpu", KEPT))
            self.prediction.append(((x - denoised) / float(self.sigmas[step])).to("cpu", KEPT))
        self.shown(step, denoised, x, total)

    def _signal(self, walk: Walk) -> list[float]:
        """What takes a latent of ComfyUI's to the method's scale, at each step."""
        is_flow = not isinstance(walk.grid, DiffusionGrid)
        return [1.0] * len(walk.policy) if is_flow else signal_of(self.sigmas).tolist()


def walk_of_sampler(sampler: Any, model: Any, sigmas: Tensor) -> Walk | None:
    """The steps of a PCPO sampler on a MODEL; None for any other."""
    if not is_pcpo(sampler):
        return None
    settings: SdeSettings = sampler.extra_options["settings"]
    return walk_of(settings, sampling_of(model), sigmas, spec_of_network(model.model))


def is_pcpo(sampler: Any) -> bool:
    """Whether a SAMPLER is PCPO SDE Sampler's."""
    return getattr(sampler, "sampler_function", None) is sample_sde


def trajectory_of(
    record: Recorder,
    final: Float[Tensor, "b *d"],
    to_latent: Callable[[Tensor], Tensor],
    seed: int,
    images: list[int],
) -> SampledTrajectory:
    """What a record amounts to.

    Args:
        final: what was sampled, in the model's scale.
        to_latent: from the model's scale to that of VAE Decode.
        images: which image of its batch each one is.
    """
    if not record.clean:
        raise NodeError("this SAMPLER tells nothing of its steps; use another, such as euler")
    clean = torch.stack(record.clean, dim=1)
    latents = to_latent(clean.flatten(0, 1).float()).to(KEPT).unflatten(0, clean.shape[:2])
    policy = None
    if record.walk is not None and record.x:
        step = record.walk.policy.nonzero().flatten()
        noise = stream_noise(seed, images, len(record.walk.policy), final.shape[1:])
        policy = Trajectory(
            step=step,
            x=torch.stack(record.x, dim=1),
            prediction=torch.stack(record.prediction, dim=1),
            noise=noise[:, step + 1].to(KEPT),
            final=final.to("cpu", KEPT),
            clean=clean[:, -1],
        )
    return SampledTrajectory(record.sigmas, latents, policy)
