"""The result of a rollout: the only data passed between the stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A batch of sampled trajectories, at the steps that carry a policy.

    Attributes:
        step: the plan's row of each of the k kept steps, ascending; always on the CPU.
        x: the latent each kept step started from.
        prediction: the old policy's (guided) prediction there, as precise as it was computed.
        noise: the standard normal noise that was drawn.
        final: the latent after the last step.
        clean: the clean estimate of the last step (DanceGRPO on FLUX decodes this one).
        reference: the frozen network's prediction; only if a KL term or the policy needs it.
    """

    step: Int[Tensor, " k"]
    x: Float[Tensor, "b k *d"]
    prediction: Float[Tensor, "b k *d"]
    noise: Float[Tensor, "b k *d"]
    final: Float[Tensor, "b *d"]
    clean: Float[Tensor, "b *d"]
    reference: Float[Tensor, "b k *d"] | None = None

    def __len__(self) -> int:
        return len(self.final)

    def __getitem__(self, images: slice) -> Trajectory:
        """The same steps of some of the images."""
        return self._map(lambda t: t[images])

    def to(self, device: torch.device | str) -> Trajectory:
        """The same trajectories on another device; `step` stays on the CPU."""
        return self._map(lambda t: t.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Trajectory:
        return replace(self, **{name: function(rows) for name, rows in _columns(self).items()})


def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
    """Join batches, at least one, that were sampled with one plan, in order."""
    columns = [_columns(part) for part in parts]
    joined = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    return replace(parts[0], **joined)


def _columns(trajectory: Trajectory) -> dict[str, Tensor]:
    """Every field that has one row per image."""
    values = {f.name: getattr(trajectory, f.name) for f in fields(trajectory) if f.name != "step"}
    return {name: value for name, value in values.items() if value is not None}
