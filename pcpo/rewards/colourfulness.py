"""How colourful a picture is, as people judge it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .analytic import Analytic, Pixels

MEAN_WEIGHT = 0.3
"""Weight of the distance from grey beside the spread of colours."""


class Colourfulness(Analytic):
    """The measure of Hasler and Süsstrunk 2003: spread + 0.3 distance from grey.

    With rg = R - G and yb = (R + G) / 2 - B in units of 0 to 255, over the pixels of an image,

        value = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2).

    Their viewers called 15 slightly, 33 moderately, 59 quite and 109 extremely colourful. All
    colours are at most r = 255 sqrt(1.25) away from grey, hence spread^2 + mean^2 <= r^2 and
    value <= r sqrt(1 + 0.3^2), which a mixture of two complementary colours reaches.
    """

    name: ClassVar[str] = "colourfulness"
    bounds: ClassVar[tuple[float, float]] = (0.0, 255 * (1.25 * (1 + MEAN_WEIGHT**2)) ** 0.5)
    unit: ClassVar[str] = "colour levels"

    def value(self, pixels: Pixels, prompts: Sequence[str]) -> Tensor:
        red, green, blue = (255 * pixels).unbind(1)
        opponent = torch.stack([red - green, (red + green) / 2 - blue], dim=1).flatten(2)
        spread = opponent.var(2, correction=0).sum(1)
        return _root(spread) + MEAN_WEIGHT * _root(opponent.mean(2).square().sum(1))


def _root(squares: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The square root, with gradient 0 instead of infinity at 0."""
    is_zero = squares == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, squares).sqrt())
