"""A contact sheet: pictures side by side, best first, each with its score below.

All lengths are in px.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

from .captions import one_line

GROUND, TEXT, MUTED, BEST = "#3a3d42", "#f4f5f7", "#a9aeb6", "#6fdc9d"
TILE, MIN_TILE = 256, 128
"""Usual and smallest length of an image's longer side on the sheet."""

MAX_WIDTH = 2048
"""Widest sheet, as long as its tiles are no smaller than `MIN_TILE`."""

ASPECT = 1.3
"""Width to height of the grid, if the number of images allows it."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The layout of a sheet.

    Attributes:
        columns: of images.
        rows: of images.
        shown: width and height of an image.
        cell: width of an image's place, which its caption fills.
        gap: between places, and around the sheet.
        text: height of the letters.
        lines: of parts below each score.
    """

    columns: int
    rows: int
    shown: tuple[int, int]
    cell: int
    gap: int
    text: int
    lines: int = 0

    @property
    def band(self) -> int:
        """Height of a caption."""
        return self.text * 2 + self.lines * self.step

    @property
    def step(self) -> int:
        """Distance between lines of parts."""
        return self.small * 3 // 2

    @property
    def small(self) -> int:
        """Height of the parts' letters."""
        return max(9, self.text * 3 // 4)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the sheet."""
        height = self.rows * (self.shown[1] + self.band)
        return self.columns * (self.cell + self.gap) + self.gap, height + (self.rows + 1) * self.gap

    def corner(self, place: int) -> tuple[int, int]:
        """The upper left corner of a place."""
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
    pictures: Sequence[Image.Image],
    values: Sequence[float],
    order: Sequence[int],
    parts: Sequence[Mapping[str, float]] = (),
) -> Image.Image:
    """Draw pictures with their scores, the first one framed.

    Args:
        pictures: of any sizes; each is fitted into the largest one's place.
        values: their scores; NaN if there is none.
        order: indices of the pictures, best first.
        parts: named parts of each picture's score, drawn below it.
    """
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    lines = max(map(len, parts), default=0)
    grid = replace(grid_of(len(order), width, height), lines=lines)
    sheet = Image.new("RGB", grid.size, GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(grid.text)
    for place, i in enumerate(order):
        x, y = grid.corner(place)
        shown = _fit(pictures[i].convert("RGB"), grid.shown)
        left, bottom = x + (grid.cell - shown.width) // 2, y + grid.shown[1]
        top = y + (grid.shown[1] - shown.height) // 2
        sheet.paste(shown, (left, top))
        is_best = place == 0 and math.isfinite(values[i])
        if is_best:
            frame = (left - 4, top - 4, left + shown.width + 3, top + shown.height + 3)
            draw.rectangle(frame, outline=BEST, width=4)
        middle = bottom + grid.text + 1
        value = f"{values[i]:.4f}" if math.isfinite(values[i]) else "no score"
        draw.text((x, middle), value, BEST if is_best else TEXT, font, anchor="lm")
        draw.text((x + grid.cell, middle), f"#{i}", MUTED, font, anchor="rm")
        if parts:
            _draw_parts(draw, grid, (x, bottom + grid.text * 2), parts[i])
    return sheet


def _draw_parts(
    draw: ImageDraw.ImageDraw, grid: Grid, corner: tuple[int, int], parts: Mapping[str, float]
) -> None:
    """Draw names at the left, cut to fit, and numbers at the right."""
    font = ImageFont.load_default(grid.small)
    for row, (name, value) in enumerate(parts.items()):
        y = corner[1] + row * grid.step + grid.step // 3
        number = f"{value:.4g}" if math.isfinite(value) else "-"
        room = grid.cell - draw.textlength(f" {number}", font)
        draw.text((corner[0], y), one_line(name, font, room), MUTED, font, anchor="lm")
        draw.text((corner[0] + grid.cell, y), number, MUTED, font, anchor="rm")


def _fit(picture: Image.Image, box: tuple[int, int]) -> Image.Image:
    """Resize the picture to fit the box."""
    scale = min(box[0] / picture.width, box[1] / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, Image.Resampling.LANCZOS)
