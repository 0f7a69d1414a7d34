"""How near a picture's pixels are to the colour that its prompt names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .. import scenes
from .analytic import Analytic, Pixels

COLOURS: dict[str, tuple[int, int, int]] = {
    **{word: scenes.COLOURS[name] for name, words in scenes.COLOUR_WORDS.items() for word in words},
    "orange": (240, 140, 30),
    "pink": (240, 130, 180),
    "brown": (120, 75, 40),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "gray": (128, 128, 128),
}
"""Words for colours, including those of the demo's scenes, in RGB of 0 to 255."""

WORD = re.compile(rf"\b({'|'.join(COLOURS)})\b", re.IGNORECASE)


def colour_word(prompt: str) -> str | None:
    """The first word for a colour, in lower case.

    >>> colour_word("a barred door, Golden light on red brick")
    'golden'
    """
    match = WORD.search(prompt)
    return match.group().lower() if match else None


class Colour(Analytic):
    """1 minus the mean squared difference, of values in 0 to 1, to the prompt's first colour.

    Differences are taken over all pixels and the three channels. A cheap reward that depends on
    the prompt; all pixels count, so it ends in a picture of that colour alone.
    """

    name: ClassVar[str] = "colour"
    needs_prompt: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)
    unit: ClassVar[str] = "1 - squared difference"

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        none = f"the prompt has none of the words {', '.join(COLOURS)}"
        return [none if colour_word(prompt) is None else None for prompt in prompts]

    def value(self, pixels: Pixels, prompts: Sequence[str]) -> Tensor:
        return 1 - (pixels - _targets(pixels, prompts)).square().mean((1, 2, 3))


def _targets(pixels: Pixels, prompts: Sequence[str]) -> Float[Tensor, "b 3 1 1"]:
    colours = [COLOURS[colour_word(prompt) or ""] for prompt in prompts]
    return pixels.new_tensor(colours)[:, :, None, None] / 255
