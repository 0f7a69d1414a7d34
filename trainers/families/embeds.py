"""Prompt embeddings, as text encoders make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import shorten

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...pcpo.finite import all_finite
from ..finite import NotFiniteError


@dataclass(frozen=True, slots=True, eq=False)
class Embeds:
    """The conditioning of some prompts; rows are prompts.

    Attributes:
        tokens: one vector per token, which the network attends to.
        pooled: one vector per prompt, if the network takes one (SD3, FLUX).
    """

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"] | None = None

    @classmethod
    def from_encoder(
        cls, prompts: Sequence[str], tokens: Tensor, pooled: Tensor | None = None
    ) -> Embeds:
        """Make the embeddings of prompts; `NotFiniteError`, naming its prompt, if one is not
        finite.
        """
        for i, prompt in enumerate(prompts):
            if not all_finite([tokens[i], *(() if pooled is None else [pooled[i]])]):
                raise NotFiniteError(
                    f"the text encoder's embeddings of {shorten(prompt, 60)!r} are not finite (NaN "
                    "or infinite): its weights are damaged, or overflow in this precision; choose "
                    "another text encoder"
                )
        return cls(tokens, pooled)

    @classmethod
    def concatenate(cls, parts: Sequence[Embeds]) -> Embeds:
        """Concatenate prompts; all parts are of one model."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return cls(
            torch.cat([part.tokens for part in parts]), torch.cat(pooled) if pooled else None
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Embeds:
        return self._each(lambda tensor: tensor[rows])

    def expand(self, count: int) -> Embeds:
        """Repeat one prompt in `count` rows, without a copy."""
        return self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))

    def pin_memory(self) -> Embeds:
        """Pin the memory, so that a copy to a GPU does not wait."""
        return self._each(Tensor.pin_memory)

    def to(self, where: torch.device | torch.dtype | str, *, non_blocking: bool = False) -> Embeds:
        return self._each(lambda tensor: tensor.to(where, non_blocking=non_blocking))

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Embeds:
        return Embeds(change(self.tokens), None if self.pooled is None else change(self.pooled))


@dataclass(frozen=True, slots=True, eq=False)
class SharedEmbeds:
    """Embeddings whose equal rows are stored once, as the images of a prompt have them.

    Attributes:
        distinct: each once.
        row: the index of each row in `distinct`, on their device.
    """

    distinct: Embeds
    row: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Embeds:
        return self.distinct[self.row[rows]]

    @property
    def device(self) -> torch.device:
        return self.distinct.device
