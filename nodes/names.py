"""Names of files that nothing else has, and what a LoRA's file must not hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from torch import Tensor

from ..pcpo.finite import first_not_finite
from .errors import NodeError


def lora_file(folder: Path, name: str) -> Path:
    """The file of a LoRA."""
    return folder / f"{name}.safetensors"


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """A name that is not taken: NAME, NAME-2, NAME-3 ...

    >>> free_name("a", ["a", "a-2"].__contains__)
    'a-3'
    """
    others = (f"{name}-{number}" for number in count(2))
    return next(other for other in others if not is_taken(other)) if is_taken(name) else name


def checked_lora(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """A LoRA's tensors, as they were read.

    Raises:
        NodeError: where one is not finite.
    """
    if (broken := first_not_finite(tensors)) is not None:
        raise NodeError(
            f"the LoRA {name} has numbers that are not finite (NaN or infinite), first in "
            f"{broken}; its training diverged: choose another file, or an earlier iteration"
        )
    return tensors
