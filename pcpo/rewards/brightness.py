"""How bright a picture is: a reward whose gradient is the same at every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from .analytic import Analytic, Pixels, luma


class Brightness(Analytic):
    """The mean grey of the pixels as stored (BT.601 luma): 0 is black, 1 is white."""

    name: ClassVar[str] = "brightness"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    unit: ClassVar[str] = "share of white"

    def value(self, pixels: Pixels, prompts: Sequence[str]) -> Tensor:
        return luma(pixels).mean((-2, -1))
