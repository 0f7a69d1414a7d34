"""What text encoders made of prompts."""

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
        tokens: one vector a token, what the network attends to.
        pooled: one vector a prompt, where the network takes one besides (SD3, FLUX).
    """

    tokens: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"] | None = None

    @classmethod
    def checked(
        cls, prompts: Sequence[str], tokens: Tensor, pooled: Tensor | None = None
    ) -> Embeds:
        """What text encoders have just made.

        Args:
            prompts: that it was made of.
            tokens: see above.
            pooled: likewise.

        Returns:
            The embeddings.

        Raises:
            NotFiniteError: where one is not finite, naming its prompt.
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

    def to(self, where: torch.device | torch.dtype | str, *, non_blocking: bool = False) -> Embeds:
        """On a device, or in another precision."""
        return self._each(lambda tensor: tensor.to(where, non_blocking=non_blocking))

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.tokens.device

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Embeds:
        return Embeds(change(self.tokens), None if self.pooled is None else change(self.pooled))


@dataclass(frozen=True, slots=True, eq=False)
class SharedEmbeds:
    """Embeddings whose rows share what is the same, as the images of a prompt do.

    Attributes:
        distinct: each once.
        row: which of them each row is, on their device.
    """

    distinct: Embeds
    row: Int[Tensor, " b"]

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, rows: Sequence[int] | Tensor) -> Embeds:
        return self.distinct[self.row[rows]]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.distinct.device
