"""Draw docs/icon.png and docs/banner.png, which the node registry shows beside the pack's name.

    uv run --extra test python docs/draw_icon.py

The banner's pictures are from docs/before_after.png: the demo model before and after its training.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

DOCS = Path(__file__).parent
ICON, BANNER = DOCS / "icon.png", DOCS / "banner.png"
NIGHT, LINE, WORDS, SOFT = "#14161c", "#8b93a7", "#f4f6fb", "#b3bacb"
RED, YELLOW, CYAN = "#dc2828", "#f0d028", "#28c8d2"
TILE, FIRST, ACROSS, DOWN = 160, (10, 10), 334, 204
"""In pixels of before_after.png: a picture, the first one's corner, the way to the next pair."""
SHOWN = ((1, 1), (2, 0), (3, 3), (0, 5))
"""Column and row of the pairs on the banner."""


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """A dark figure, and axes over all of it in hundredths of its height."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor=NIGHT)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 100 * width / height), ylim=(0, 100), aspect="equal")
    axes.axis("off")
    return figure, axes


def draw_sign(axes: Axes, x: float, y: float, size: float) -> None:
    """Three of the demo's shapes on a rising line; (x, y) is the lower left corner."""
    place = size / 100 * np.array([[22, 23], [50, 49], [78, 77]]) + (x, y)
    axes.plot(*place.T, color=LINE, linewidth=0.05 * size, zorder=1)
    half = 0.13 * size
    (left, middle, right) = place
    axes.add_patch(Rectangle(tuple(left - half), 2 * half, 2 * half, color=RED, zorder=2))
    corners = middle + half * np.array([[-1.25, -1], [1.25, -1], [0, 1.25]])
    axes.add_patch(Polygon(corners, color=YELLOW, zorder=2))
    axes.add_patch(Circle(tuple(right), 1.1 * half, color=CYAN, zorder=2))


def draw_icon() -> None:
    """400 x 400 px."""
    figure, axes = blank(4, 4)
    draw_sign(axes, 0, 0, 100)
    figure.savefig(ICON)


def draw_banner() -> None:
    """1260 x 540 px (21:9)."""
    figure, axes = blank(12.6, 5.4)
    draw_sign(axes, 9, 62, 26)
    with rc_context({"font.family": "DejaVu Sans"}):
        axes.text(41, 70, "PCPO", color=WORDS, fontsize=58, weight="bold", va="center")
        lines = (
            "Teach your image model what you like.",
            "Reinforcement learning on your own GPU,",
            "in ComfyUI.",
        )
        for row, line in enumerate(lines):
            axes.text(
                9, 46 - 10 * row, line, color=SOFT if row else WORDS, fontsize=20, va="center"
            )
        axes.text(9, 9, "SD 1.5, SDXL, SD 3.5, FLUX.1-dev", color=LINE, fontsize=15, va="center")
        sheet = imread(DOCS / "before_after.png")
        for number, (column, row) in enumerate(SHOWN):
            left, top = 127 + 52.5 * (number % 2), 94 - 46.5 * (number // 2)
            for after in (0, 1):
                across = FIRST[0] + ACROSS * column + (TILE + 4) * after
                down = FIRST[1] + DOWN * row
                picture = sheet[down : down + TILE, across : across + TILE]
                start = left + 24.5 * after
                axes.imshow(picture, extent=(start, start + 23.5, top - 23.5, top), zorder=2)
                words, colour = ("after", CYAN) if after else ("before", LINE)
                axes.text(
                    start + 11.75,
                    top - 28.5,
                    words,
                    color=colour,
                    fontsize=14,
                    ha="center",
                    va="center",
                )
            box = FancyBboxPatch(
                (left - 1, top - 32.5),
                50,
                33.5,
                boxstyle="round,pad=0.5",
                color="#1f232d",
                zorder=1,
            )
            axes.add_patch(box)
    axes.set(xlim=(0, 100 * 12.6 / 5.4), ylim=(0, 100))
    figure.savefig(BANNER)


if __name__ == "__main__":
    draw_icon()
    draw_banner()
