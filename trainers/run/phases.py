"""The phases of a run, named where they are: `pcpo profile` measures them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from typing import Any

ITERATION, LOSS, REFERENCE = "rest of the iteration", "ratio and objective", "reference"

measure: Callable[[str, bool], AbstractContextManager[Any]] | None = None
"""What a phase is within, by its name and whether phases inside it are parts of it; None in a run
that is not profiled."""


class phase(ContextDecorator):
    """Name a function, or what is done within it, as a phase.

    Args:
        is_whole: count the phases inside it as parts of it.
    """

    def __init__(self, name: str, *, is_whole: bool = False) -> None:
        self.name, self.is_whole = name, is_whole

    def _recreate_cm(self) -> phase:  # for each call of a function
        return phase(self.name, is_whole=self.is_whole)

    def __enter__(self) -> None:
        self.within = measure(self.name, self.is_whole) if measure else nullcontext()
        self.within.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.within.__exit__(*raised)
