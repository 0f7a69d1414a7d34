"""Prompt embeddings, as text encoders make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from ...pcpo.finite import all_finite
from ..finite import NotFiniteError

MULTIPLE = 32
"""Rows of tokens, where prompts have lengths, are a multiple of it, as Z-Image pads them."""


@dataclass(frozen=True, slots=True, eq=False)
class Embeds:
    """The conditioning of some prompts; rows are prompts.

    Attributes:
        tokens: one vector per token, which the network attends to.
        pooled: one vector per prompt, if the network takes one (SDXL, SD3, FLUX).
        sizes: that each image is told, in px, where every image has its own (SDXL).
        lengths: tokens of each prompt, if those differ (Z-Image); beyond them rows are 0.
        is_ragged: whether a prompt has more rows than its length needs, for a longer one's sake.
    """

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"] | None = None
    sizes: Float[Tensor, "b 6"] | None = None
    lengths: Int[Tensor, " b"] | None = None
    is_ragged: bool = False

    @classmethod
    def from_encoder(
        cls,
        prompts: Sequence[str],
        tokens: Tensor,
        pooled: Tensor | None = None,
        lengths: Tensor | None = None,
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
        return cls(tokens, pooled, lengths=lengths)

    @classmethod
    def concatenate(cls, parts: Sequence[Embeds]) -> Embeds:
        """Concatenate prompts, the shorter ones padded; all parts are of one model."""
        longest = max(part.tokens.shape[1] for part in parts)
        tokens = [pad(p.tokens, (0, 0, 0, longest - p.tokens.shape[1])) for p in parts]
        is_ragged = any(p.is_ragged or p.tokens.shape[1] < longest for p in parts)
        columns = zip(*((part.pooled, part.sizes, part.lengths) for part in parts), strict=True)
        return cls(torch.cat(tokens), *map(_joined, columns), is_ragged=is_ragged)

    @classmethod
    def from_rows(cls, prompts: Sequence[str], states: Sequence[Float[Tensor, "l d"]]) -> Embeds:
        """The embeddings of prompts of different lengths; errors as in `from_encoder`."""
        rows = []
        for prompt, tokens in zip(prompts, states, strict=True):
            lengths = torch.tensor([len(tokens)], device=tokens.device)
            padded = pad(tokens, (0, 0, 0, -len(tokens) % MULTIPLE))[None]
            rows.append(cls.from_encoder([prompt], padded, None, lengths))
        return cls.concatenate(rows)

    def trim(self) -> Embeds:
        """One prompt, without the rows that it has for others' sake."""
        if self.lengths is None:
            return self
        rows = -(-int(self.lengths.max()) // MULTIPLE) * MULTIPLE
        return replace(self, tokens=self.tokens[:, :rows], is_ragged=False)

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
        return self._each(
            lambda tensor: (
                tensor.to(where, non_blocking=non_blocking)
                if tensor.is_floating_point() or not isinstance(where, torch.dtype)
                else tensor
            )
        )

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def nbytes(self) -> int:
        return sum(
            t.nbytes for t in (self.tokens, self.pooled, self.sizes, self.lengths) if t is not None
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Embeds:
        more = (self.pooled, self.sizes, self.lengths)
        tensors = (None if t is None else change(t) for t in more)
        return Embeds(change(self.tokens), *tensors, is_ragged=self.is_ragged)


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in column if part is not None]
    return torch.cat(there) if there else None


@dataclass(frozen=True, slots=True, eq=False)
class SharedEmbeds:
    """Embeddings whose equal rows are stored once, as the images of a prompt have them.

    Attributes:
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

    def every(self, step: int) -> SharedEmbeds:
        """Each row whose number is a multiple of `step`."""
        sizes = None if self.sizes is None else self.sizes[::step]
        return replace(self, row=self.row[::step], sizes=sizes)

    @property
    def device(self) -> torch.device:
        return self.distinct.device
