"""Prompt embeddings, as text encoders make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
        pooled: one vector per prompt, if the network takes one (SDXL, SD3, FLUX).
        sizes: that each image is told, in px, where every image has its own (SDXL).
    """

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"] | None = None
    sizes: Float[Tensor, "b 6"] | None = None

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
        tokens = torch.cat([part.tokens for part in parts])
        more = ([part.pooled for part in parts], [part.sizes for part in parts])
        return cls(tokens, *map(_joined, more))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Embeds:
        return self._each(lambda tensor: tensor[rows])

    def expand(self, count: int, sizes: Tensor | None = None) -> Embeds:
        """Repeat one prompt in `count` rows, without a copy; `sizes` are told to each."""
        repeated = self._each(lambda tensor: tensor.expand(count, *tensor.shape[1:]))
        return repeated if sizes is None else replace(repeated, sizes=sizes)

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
        more = (self.pooled, self.sizes)
        return Embeds(change(self.tokens), *(None if t is None else change(t) for t in more))


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in column if part is not None]
    return torch.cat(there) if there else None


@dataclass(frozen=True, slots=True, eq=False)
class SharedEmbeds:
    """Embeddings whose equal rows are stored once, as the images of a prompt have them.

    Attributes:
        distinct: each once.
        row: the index of each row in `distinct`, on their device.
        sizes: that each row is told, likewise.
    """

    distinct: Embeds
    row: Int[Tensor, " b"]
    sizes: Float[Tensor, "b 6"] | None = None

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Embeds:
        found = self.distinct[self.row[rows]]
        return found if self.sizes is None else replace(found, sizes=self.sizes[rows])

    @property
    def device(self) -> torch.device:
        return self.distinct.device
