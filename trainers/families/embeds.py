"""What text encoders made of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Embeds:
    """The conditioning of some prompts; rows are prompts.

    Attributes:
        tokens: one vector a token, what the network attends to.
        pooled: one vector a prompt, where the network takes one besides (SD3, FLUX).
    """

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"] | None = None

    @classmethod
    def joined(cls, parts: Sequence[Embeds]) -> Embeds:
        """Prompts one after the other; all parts are of one model."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            torch.cat([part.tokens for part in parts]), torch.cat(pooled) if pooled else None
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Embeds:
        return self._each(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Embeds:
        """One prompt as so many rows, without a copy."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def pin_memory(self) -> Embeds:
        """In memory that is copied to a GPU without waiting."""
        return self._each(Tensor.pin_memory)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Embeds:
        """On a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Embeds:
        return Embeds(change(self.tokens), None if self.pooled is None else change(self.pooled))
