"""What a reward is, and what it says of a batch of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from .pictures.tensors import Pictures


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a batch.

    Attributes:
        values: the reward of each image, float32 on the CPU; NaN if it could not be computed.
        details: named parts of each image's reward, for reports; may be empty.
        errors: why an image has no reward, None if it has one.
    """

    values: Float32[Tensor, " b"]
    details: tuple[Mapping[str, float], ...] = ()
    errors: tuple[str | None, ...] = ()

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """Join the scores of consecutive batches."""
        if not parts:
            return cls(torch.zeros(0))
        has = any(part.details for part in parts), any(part.errors for part in parts)
        rows = [len(part.values) for part in parts]
        details = [d for p, n in zip(parts, rows, strict=True) for d in p.details or [{}] * n]
        errors = [e for p, n in zip(parts, rows, strict=True) for e in p.errors or [None] * n]
        values = torch.cat([part.values for part in parts])
        return cls(values, tuple(details) if has[0] else (), tuple(errors) if has[1] else ())


class Reward(Protocol):
    """A reward. Making one loads nothing; weights and packages are only looked up.

    Attributes:
        name: its key in `REWARDS`.
        needs_prompt: whether the score depends on the prompt.
        bounds: the smallest and largest possible value, infinite where there is none.
        is_elsewhere: whether a server computes it.
    """

    @property
    def name(self) -> str: ...
    @property
    def needs_prompt(self) -> bool: ...
    @property
    def bounds(self) -> tuple[float, float]: ...
    @property
    def is_elsewhere(self) -> bool: ...

    def score(self, images: Pictures, prompts: Sequence[str]) -> Scores:
        """Score each image against its own prompt; `len(prompts)` is the batch size."""
        ...

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        """Why each prompt cannot be scored, None if it can; nothing is loaded for it."""
        ...

    def modules(self) -> list[nn.Module]:
        """The networks, loaded if they are not yet; empty if it computes without one."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: weights by hash, preparation, dtype, versions."""
        ...
