"""Two sides' images as a grid: equal prompt and seed side by side, with scores; lengths in px."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...pcpo.pictures.captions import one_line
from ...pcpo.pictures.contact_sheet import BEST, GROUND, MAX_WIDTH, MIN_TILE, MUTED, TEXT, TILE
from .numbers import SIDES, Values

MAX_HEIGHT = 4096
"""Of a page, as long as it holds one prompt."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are on a page.

    Attributes:
        shown: width and height of an image.
        cell: width of an image's place, which its caption fills.
        gap: between a pair's images; twice that between pairs and around.
    """

    shown: tuple[int, int]
    cell: int
    across: int
    lines: int
    prompts: int
    gap: int

    @property
    def text(self) -> int:
        """Height of the letters' font."""
        return min(TILE // 13, self.cell // 9)

    @property
    def band(self) -> int:
        """Height of a line of text."""
        return self.text * 2

    @property
    def pair(self) -> int:
        """From one pair to the next."""
        return 2 * self.cell + 3 * self.gap

    @property
    def row(self) -> int:
        """From one line of pairs to the next."""
        return self.shown[1] + self.band + self.gap

    @property
    def block(self) -> int:
        """From one prompt to the next."""
        return self.band + self.lines * self.row + self.gap

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a page."""
        height = 2 * self.gap + self.band + self.prompts * self.block
        return self.across * self.pair + 2 * self.gap, height

    def corner(self, prompt: int, seed: int, side: int) -> tuple[int, int]:
        """The upper left corner of an image's place, the prompt counted on its page."""
        line, column = divmod(seed, self.across)
        x = 2 * self.gap + column * self.pair + side * (self.cell + self.gap)
        top = 2 * self.gap + self.band + prompt * self.block
        return x, top + self.band + line * self.row


def layout_of(prompts: int, seeds: int, width: int, height: int) -> Layout:
    """Lay out pairs of images of one size, so that pages have about the same number of prompts."""
    tile = max(MIN_TILE, min(TILE, MAX_WIDTH * 7 // 8 // (2 * seeds)))
    scale = tile / max(width, height)
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    cell, gap = max(shown[0], MIN_TILE), tile // 16
    fitting = max(1, MAX_WIDTH // (2 * cell + 3 * gap))
    lines = math.ceil(seeds / min(seeds, fitting))
    one = Layout(shown, cell, math.ceil(seeds / lines), lines, 1, gap)
    most = max(1, (MAX_HEIGHT - one.size[1]) // one.block + 1)
    pages = math.ceil(prompts / most)
    return Layout(shown, cell, one.across, lines, math.ceil(prompts / pages), gap)


def grid(
    pixels: UInt8[Tensor, "2 prompts seeds 3 h w"],
    scores: Values,
    prompts: Sequence[str],
    names: Sequence[str],
) -> Float[Tensor, "pages high wide 3"]:
    """Draw the pairs with their scores, the better one of each framed.

    Returns:
        Pages of one size, 0 to 1; one where all prompts fit.
    """
    count, seeds = pixels.shape[1:3]
    layout = layout_of(count, seeds, pixels.shape[5], pixels.shape[4])
    pages = []
    for start in range(0, count, layout.prompts):
        page = _Page(layout, names)
        for place in range(min(layout.prompts, count - start)):
            page.write(place, f"{start + place + 1}  {prompts[start + place]}")
            for seed in range(seeds):
                at = start + place, seed
                page.draw(place, seed, pixels[:, *at], scores[:, *at].tolist())
        pages.append(torch.from_numpy(np.asarray(page.sheet).astype(np.float32) / 255))
    return torch.stack(pages)


class _Page:
    """A page of the grid."""

    def __init__(self, layout: Layout, names: Sequence[str]) -> None:
        self.layout = layout
        self.sheet = Image.new("RGB", layout.size, GROUND)
        self.pen, self.font = ImageDraw.Draw(self.sheet), ImageFont.load_default(layout.text)
        room = (layout.size[0] - 4 * layout.gap) // 2
        for side, name in enumerate(names):
            x = 2 * layout.gap + side * room
            text = one_line(f"{SIDES[side]}: {name}", self.font, room - 2 * layout.gap)
            self.pen.text((x, layout.gap + layout.band // 2), text, MUTED, self.font, anchor="lm")

    def write(self, prompt: int, text: str) -> None:
        """A prompt above its images."""
        x, y = self.layout.corner(prompt, 0, 0)
        line = one_line(text, self.font, self.layout.size[0] - 2 * x)
        self.pen.text((x, y - self.layout.band // 2), line, TEXT, self.font, anchor="lm")

    def draw(
        self,
        prompt: int,
        seed: int,
        pair: UInt8[Tensor, "2 3 h w"],
        scores: Sequence[float],
    ) -> None:
        """A pair and its scores; where one has none, neither is better."""
        better = {scores[0] > scores[1]: 0, scores[1] > scores[0]: 1}.get(True)
        for side, pixels in enumerate(pair):
            corner = self.layout.corner(prompt, seed, side)
            self._show(corner, pixels, side == better)
            score = f"{scores[side]:.4f}" if math.isfinite(scores[side]) else "no score"
            self._caption(corner, f"{SIDES[side]} {score}", BEST if side == better else TEXT)
        self._number(self.layout.corner(prompt, seed, 1), f"#{seed}")

    def _show(
        self, corner: tuple[int, int], pixels: UInt8[Tensor, "3 h w"], is_framed: bool
    ) -> None:
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        wide, high = self.layout.shown
        left, top = corner[0] + (self.layout.cell - wide) // 2, corner[1]
        self.sheet.paste(picture.resize((wide, high), Image.Resampling.LANCZOS), (left, top))
        if is_framed:
            frame = (left - 3, top - 3, left + wide + 2, top + high + 2)
            self.pen.rectangle(frame, outline=BEST, width=3)

    def _caption(self, corner: tuple[int, int], text: str, colour: str) -> None:
        """Text below an image."""
        at = corner[0], corner[1] + self.layout.shown[1] + self.layout.text + 1
        self.pen.text(at, text, colour, self.font, anchor="lm")

    def _number(self, corner: tuple[int, int], text: str) -> None:
        """The number of the image within its prompt, below it on the right."""
        right, bottom = corner[0] + self.layout.cell, corner[1] + self.layout.shown[1]
        at = right, bottom + self.layout.text + 1
        self.pen.text(at, text, MUTED, self.font, anchor="rm")
