"""A contact sheet: the images of a batch side by side, best first, each with its score below.

All lengths are in px.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GROUND, TEXT, MUTED, BEST = "#3a3d42", "#f4f5f7", "#a9aeb6", "#6fdc9d"
TILE, MIN_TILE = 256, 128
"""The longer side of an image on the sheet: usually, and at least."""

MAX_WIDTH = 2048
"""Of a sheet, as long as its tiles do not become smaller than `MIN_TILE`."""

ASPECT = 1.3
"""Width to height of the grid, where the number of images allows it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Where things are on a sheet.

    Attributes:
        columns: of images.
        rows: of images.
        shown: width and height of an image.
        cell: width of an image's place, which its caption fills.
        gap: between places, and around the sheet.
        text: height of the letters' font.
    """

    columns: int
    rows: int
    shown: tuple[int, int]
    cell: int
    gap: int
    text: int

    @property
    def band(self) -> int:
        """Height of a caption."""
        return self.text * 2

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        height = self.rows * (self.shown[1] + self.band)
        return self.columns * (self.cell + self.gap) + self.gap, height + (self.rows + 1) * self.gap

    def corner(self, place: int) -> tuple[int, int]:
        """The upper left corner of the place of that number."""
        row, column = divmod(place, self.columns)
        y = self.gap + row * (self.shown[1] + self.band + self.gap)
        return self.gap + column * (self.cell + self.gap), y


def grid_of(count: int, width: int, height: int) -> Grid:
    """Lay out `count` images of one size in a grid of about `ASPECT`, its last row well filled."""
    wide = math.sqrt(count * 1.15 * height / width * ASPECT)
    rows = math.ceil(count / min(count, math.ceil(wide)))
    columns = math.ceil(count / rows)
    tile = max(MIN_TILE, min(TILE, MAX_WIDTH * 15 // 16 // columns))
    scale = tile / max(width, height)
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    cell = max(shown[0], MIN_TILE)
    return Grid(columns, rows, shown, cell, tile // 16, min(TILE // 13, cell // 9))


def contact_sheet(
    pixels: UInt8[Tensor, "b 3 h w"], values: Sequence[float], order: Sequence[int]
) -> Float[Tensor, "1 height width 3"]:
    """Draw a batch with its scores, the first one framed.

    Args:
        pixels: the images.
        values: their scores.
        order: their numbers, best first.

    Returns:
        The sheet, 0 to 1.
    """
    height, width = pixels.shape[-2:]
    grid = grid_of(len(order), width, height)
    sheet = Image.new("RGB", grid.size, GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(grid.text)
    for place, i in enumerate(order):
        x, y = grid.corner(place)
        picture = Image.fromarray(np.ascontiguousarray(pixels[i].permute(1, 2, 0).numpy()))
        left, bottom = x + (grid.cell - grid.shown[0]) // 2, y + grid.shown[1]
        sheet.paste(picture.resize(grid.shown, Image.Resampling.LANCZOS), (left, y))
        if place == 0:
            frame = (left - 4, y - 4, left + grid.shown[0] + 3, bottom + 3)
            draw.rectangle(frame, outline=BEST, width=4)
        middle = bottom + grid.band // 2 + 1
        colour = BEST if place == 0 else TEXT
        draw.text((x, middle), f"{values[i]:.4f}", colour, font, anchor="lm")
        draw.text((x + grid.cell, middle), f"#{i}", MUTED, font, anchor="rm")
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]
