"""Implicit Reward Guidance outside ComfyUI: `pcpo sample --irg FILE:GAMMA ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..pcpo import implicit_reward
from . import lora
from .config import ConfigError
from .families.embeds import Embeds
from .policy import Latents, Policy
from .prepare import swapped


@dataclass(frozen=True, slots=True)
class GuidedPolicy(Policy):
    """A policy led by LoRA files: base + sum of gamma_i (tuned_i - base), paper Appendix F.

    Attributes:
        parameters: the adapters'.
        versions: their values in each LoRA.
        gammas: one a LoRA.
    """

    parameters: list[torch.nn.Parameter]
    versions: list[list[Tensor]]
    gammas: list[float]

    @torch.no_grad()
    def __call__(self, x: Latents, timestep: Tensor, embeds: Embeds) -> Float[Tensor, "b c h w"]:
        """The guided prediction; one forward pass (two with CFG) a network."""
        with lora.reference(self.family.network):
            base = Policy.__call__(self, x, timestep, embeds)
        tuned = []
        for values in self.versions:
            with swapped(self.parameters, values):
                tuned.append(Policy.__call__(self, x, timestep, embeds))
        return implicit_reward(base, tuned, self.gammas)


def guided(policy: Policy, pairs: Sequence[tuple[Path, float]]) -> GuidedPolicy:
    """Lead a policy by LoRA files.

    Args:
        policy: over a network without adapters, which gets some.
        pairs: LoRA file and gamma.

    Returns:
        The guided policy; `ModelError` where a file does not fit the network.
    """
    network = policy.family.network
    found = [lora.read_lora(network, path) for path, _ in pairs]
    rank = max(delta.rank for deltas in found for delta in deltas.values())
    targets = list(dict.fromkeys(name for deltas in found for name in deltas))
    parameters = lora.add_lora(network, rank, float(rank), targets)
    versions = []
    for path, _ in pairs:
        lora.load_lora(network, path)
        versions.append([parameter.detach().clone() for parameter in parameters])
    own = {field.name: getattr(policy, field.name) for field in fields(Policy)}
    gammas = [gamma for _, gamma in pairs]
    return GuidedPolicy(**own, parameters=parameters, versions=versions, gammas=gammas)


def parse_pair(text: str) -> tuple[Path, float]:
    """FILE:GAMMA.

    Args:
        text: as on the command line; a Windows path's own colon is no end.

    Returns:
        The file, which is there, and gamma.

    Raises:
        ConfigError: where it is not such a pair, or there is no file.
    """
    name, colon, number = text.rpartition(":")
    try:
        gamma = float(number)
    except ValueError:
        gamma = float("nan")
    if not colon or not name or not abs(gamma) < float("inf"):
        raise ConfigError(f"--irg takes FILE:GAMMA, like my_lora.safetensors:0.7, not {text!r}")
    if not Path(name).is_file():
        raise ConfigError(f"--irg names {name}, which is no file; check the path")
    return Path(name), gamma
