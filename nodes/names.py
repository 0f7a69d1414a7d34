"""Names of files that nothing else has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path


def lora_file(folder: Path, name: str) -> Path:
    """The file of a LoRA."""
    return folder / f"{name}.safetensors"


def free_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """A name that is not taken: NAME, NAME-2, NAME-3 ...

    >>> free_name("a", ["a", "a-2"].__contains__)
    'a-3'

    Args:
        name: that is wanted.
        is_taken: asked of each.

    Returns:
        The first that is free.
    """
    others = (f"{name}-{number}" for number in count(2))
    return next(other for other in others if not is_taken(other)) if is_taken(name) else name
