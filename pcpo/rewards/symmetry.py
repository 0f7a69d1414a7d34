"""How far a picture equals its mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .analytic import Analytic, Pixels


class Symmetry(Analytic):
    """1 minus the mean squared difference, of pixels in 0 to 1, between left and right.

    1 where the left half mirrors the right half, 0 where one is black and the other white. A
    picture of one colour is symmetric too, so alone this reward ends there.
    """

    name: ClassVar[str] = "symmetry"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    unit: ClassVar[str] = "1 - squared difference"

    def value(self, pixels: Pixels, prompts: Sequence[str]) -> Tensor:
        return 1 - (pixels - pixels.flip(-1)).square().mean((1, 2, 3))
