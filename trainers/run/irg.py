"""Implicit Reward Guidance outside ComfyUI: `pcpo sample --irg FILE:GAMMA ...`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...pcpo import classifier_free, implicit_reward
from ...pcpo.guidance import shared_negative
from ...pcpo.row_lora import Batch, InTurn, LowRank, StackedLora
from ..config.train_config import ConfigError
from ..families.embeds import Embeds
from ..lora import adapters
from ..lora.read import Delta
from ..reading import named, no_file, shown
from .sampler import Latents, Policy


@dataclass(slots=True)
class RowLoras(InTurn):
    """LoRA files on a network, each for its own rows.

    Attributes:
        images: most images that memory allowed in one pass; None until it ran short.
    """

    images: int | None = None

    def put_on(self, network: nn.Module, files: Sequence[dict[str, Delta]]) -> None:
        """Have each layer add the files' changes.

        Args:
            network: in its dtype, on its device.
            files: changes by module path; the index of a file is the number of its version.
        """
        for path in dict.fromkeys(path for deltas in files for path in deltas):
            layer: Any = network.get_submodule(path)
            parts = [(v, deltas[path]) for v, deltas in enumerate(files) if path in deltas]
            additions = [LowRank(v, delta.up, delta.down, delta.scale) for v, delta in parts]
            self._hook(layer, StackedLora.of(layer, additions).like(layer.weight))

    def _hook(self, layer: nn.Module, stack: StackedLora) -> None:
        def add(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if self.batch is not None:
                stack(module, given[0], output, self.batch)

        layer.register_forward_hook(add)


@dataclass(frozen=True, slots=True)
class GuidedPolicy(Policy):
    """A policy guided by LoRA files: base + sum of gamma_i (tuned_i - base), paper Appendix F.

    Attributes:
        rows: the LoRAs on the network.
        shares_negative: whether the base alone predicts the negative prompt (`shared_negative`).
    """

    gammas: list[float]
    shares_negative: bool = False
    rows: RowLoras = field(default_factory=RowLoras)

    @torch.no_grad()
    def __call__(self, x: Latents, timestep: Tensor, embeds: Embeds) -> Float[Tensor, "b c h w"]:
        """The guided prediction, all versions in one pass; of fewer images if memory is short."""
        times, size = timestep.expand(len(x)), self.rows.images or len(x)
        parts = [slice(i, i + size) for i in range(0, len(x), size)]
        try:
            return torch.cat([self._predict(x[part], times[part], embeds[part]) for part in parts])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        self.rows.images = size // 2  # out of the handler, which holds on to what was computed
        return self(x, timestep, embeds)

    def _predict(self, x: Latents, timestep: Tensor, embeds: Embeds) -> Latents:
        pair = [embeds]
        if self.guidance_scale != 1:
            pair.append(self.negative.expand(len(x), embeds.sizes))
        each = pair[:1] if self.shares_negative else pair
        versions = range(len(self.gammas))
        branches = each * len(versions) + pair
        owners = (*(v for v in versions for _ in each), *(None for _ in pair))
        repeats = (len(branches), *[1] * (x.ndim - 1))
        with self.autocast(), self.rows.on(Batch(owners, len(x))):
            joined = Embeds.concatenate(branches)
            outs = self.family.predict(x.repeat(repeats), timestep.repeat(len(branches)), joined)
        predictions = list(outs.chunk(len(branches)))
        base = predictions[-len(pair) :]
        size = len(each)
        tuned = [self._combine(predictions[v * size : (v + 1) * size], base) for v in versions]
        return implicit_reward(self._combine(base, base), tuned, self.gammas)

    def _combine(self, outs: list[Tensor], base: list[Tensor]) -> Tensor:
        """Classifier-free guidance of one version."""
        if len(base) == 1:
            return outs[0]
        negative = outs[1] if len(outs) == 2 else shared_negative(outs[0], *base)
        return classifier_free(outs[0], negative, self.guidance_scale)


def guide(
    policy: Policy, pairs: Sequence[tuple[Path, float]], *, shares_negative: bool = False
) -> Policy:
    """Guide a policy by LoRA files; `ModelError` if one does not fit the network.

    Args:
        policy: over a network without adapters, whose layers are changed.
        pairs: LoRA file and gamma; one with gamma 0 costs nothing.
        shares_negative: whether the base alone predicts the negative prompt.
    """
    network = policy.family.network
    files = [adapters.read_lora(network, path) for path, _ in pairs]
    for deltas in files:
        _check(network, deltas)
    used = [(deltas, gamma) for deltas, (_, gamma) in zip(files, pairs, strict=True) if gamma]
    own = {field.name: getattr(policy, field.name) for field in fields(Policy)}
    gammas = [gamma for _, gamma in used]
    guided_policy = GuidedPolicy(**own, gammas=gammas, shares_negative=shares_negative)
    guided_policy.rows.put_on(network, [deltas for deltas, _ in used])
    return guided_policy


def _check(network: nn.Module, deltas: dict[str, Delta]) -> None:
    for path, delta in deltas.items():
        layer: Any = network.get_submodule(path)
        out, *inner = layer.weight.shape
        delta.check_fits(path, (delta.rank, *inner), (out, delta.rank))


def parse_pair(text: str) -> tuple[Path, float]:
    """Read FILE:GAMMA; the file must exist. A Windows path's own colon is not the separator."""
    name, colon, number = text.rpartition(":")
    try:
        gamma = float(number)
    except ValueError:
        gamma = float("nan")
    if not colon or not name or not abs(gamma) < float("inf"):
        raise ConfigError(
            f"--irg takes FILE:GAMMA, like my_lora.safetensors:0.7, not {shown(text)}"
        )
    if why := no_file(name):
        raise ConfigError(f"--irg names {named(name)}, which {why}; check the path")
    return Path(name), gamma
