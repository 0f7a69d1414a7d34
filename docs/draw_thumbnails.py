"""Draw the thumbnails of the workflows: what each does, and few large words.

    uv run --extra test python docs/draw_thumbnails.py
    uv run --extra test python docs/draw_thumbnails.py "03 Train a LoRA" "train a LoRA" \\
        before=JOB/samples/00000 after=JOB/samples/00018

The first draws those of real models: drawings, not images that these models made. The second makes
one of the demo models' from pictures: the first four of each folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image

WORKFLOWS = Path(__file__).parents[1] / "workflows"
GROUND, TEXT, MUTED, BEST, OTHER = "#23262d", "#ffffff", "#9aa3b2", "#58d6a0", "#f0a94e"
SIDE, DPI = 5.12, 100
"""Inches, and px an inch."""


def scene(axes: Axes, x: float, y: float, size: float, detail: int) -> None:
    """A lighthouse above the sea, with as many stripes, waves and stars as `detail` says, to 4."""
    axes.add_patch(Rectangle((x, y), size, size, color="#34507a"))
    axes.add_patch(Rectangle((x, y), size, 0.3 * size, color="#1c3048"))
    tower = ((0.4, 0.3), (0.6, 0.3), (0.56, 0.72), (0.44, 0.72))
    axes.add_patch(Polygon([(x + a * size, y + b * size) for a, b in tower], color="#e9e4d8"))
    lamp = (x + 0.42 * size, y + 0.72 * size)
    axes.add_patch(Rectangle(lamp, 0.16 * size, 0.1 * size, color=OTHER))
    for i in range(detail):
        stripe = (x + 0.43 * size, y + (0.36 + 0.11 * i) * size)
        axes.add_patch(Rectangle(stripe, 0.14 * size, 0.05 * size, color="#c04a42"))
        across, up = ((0.13, 0.56), (0.78, 0.9), (0.24, 0.8), (0.88, 0.62))[i]
        axes.plot(x + across * size, y + up * size, "*", color="#fff3c4", markersize=6 * size / 2)
        wave = [x + (0.08 + 0.05 * k) * size for k in range(17)]
        level = [y + (0.05 + 0.065 * i + 0.018 * (-1) ** k) * size for k in range(17)]
        axes.plot(wave, level, color="#6f9ccc", linewidth=1.6)


def framed(axes: Axes, x: float, y: float, size: float, colour: str) -> None:
    """A frame around a scene."""
    edge = {"fill": False, "edgecolor": colour, "linewidth": 5}
    axes.add_patch(Rectangle((x, y), size, size, **edge))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """A thick arrow."""
    shape = "simple,head_length=14,head_width=18,tail_width=5"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=shape, mutation_scale=1, color=colour))


def word(axes: Axes, x: float, y: float, text: str, size: float, colour: str = TEXT) -> None:
    """Text around a point."""
    axes.text(x, y, text, size=size, color=colour, ha="center", va="center", weight="bold")


def sample_and_score(axes: Axes) -> None:
    """Four images, the best first."""
    for i, (detail, score) in enumerate(((4, 0.91), (3, 0.74), (1, 0.42), (0, 0.18))):
        x, y = 1.05 + 4.2 * (i % 2), 5.3 - 3.4 * (i // 2)
        scene(axes, x, y, 2.7, detail)
        word(axes, x + 3.35, y + 1.35, f"{score:.2f}"[1:], 15, TEXT if i else BEST)
        if i == 0:
            framed(axes, x, y, 2.7, BEST)


def train_in_background(axes: Axes) -> None:
    """Before, after, and the reward's curve between them."""
    for x, detail, name in ((0.5, 0, "before"), (6.5, 4, "after")):
        scene(axes, x, 4.9, 3.0, detail)
        word(axes, x + 1.5, 4.45, name, 14, MUTED)
    framed(axes, 6.5, 4.9, 3.0, BEST)
    arrow(axes, (3.9, 6.4), (6.1, 6.4), BEST)
    word(axes, 5, 7.1, "LoRA", 15)
    curve = [1 - 0.82**i + 0.05 * (-1) ** i for i in range(15)]
    axes.plot(
        [0.9 + 0.58 * i for i in range(15)], [2.3 + 1.55 * c for c in curve], color=BEST, lw=5
    )
    axes.plot([0.6, 0.6, 9.4], [3.95, 2.1, 2.1], color=MUTED, linewidth=2)
    word(axes, 7.2, 2.65, "reward", 14, MUTED)


def irg_two_rewards(axes: Axes) -> None:
    """From the base along two LoRAs, each as far as its gamma says."""
    corner = (6.3, 3.1)
    scene(axes, 0.5, 1.9, 2.2, 0)
    scene(axes, 6.6, 5.4, 2.7, 4)
    framed(axes, 6.6, 5.4, 2.7, BEST)
    arrow(axes, (2.9, 2.9), corner, BEST)
    arrow(axes, corner, (7.5, 5.2), OTHER)
    axes.plot([2.2, 6.4], [4.3, 6.7], "--", color=MUTED, linewidth=2.5)
    word(axes, 1.2, 4.5, "base", 15, MUTED)
    word(axes, 4.7, 2.4, "reward 1", 16, BEST)
    word(axes, 8.4, 3.9, "reward 2", 16, OTHER)


def taste(axes: Axes) -> None:
    """Two images, of which one is chosen, and what that teaches."""
    for x, detail in ((0.6, 1), (5.4, 4)):
        scene(axes, x, 3.9, 4.0, detail)
    framed(axes, 5.4, 3.9, 4.0, BEST)
    arrow(axes, (4.2, 2.6), (2.2, 2.6), MUTED)
    arrow(axes, (5.8, 2.6), (7.8, 2.6), BEST)


FAMILIES = {
    **{name: name for name in ("SD 1.5", "SD 3.5", "SDXL", "Z-Image")},
    **{"FLUX.1": "FLUX", "FLUX.2 klein": "klein 4B"},
}
KINDS: dict[str, tuple[str, Callable[[Axes], None]]] = {
    "Sample and score": ("sample and score", sample_and_score),
    "Train a LoRA": ("train a LoRA", train_in_background),
    "Mix two rewards": ("two rewards", irg_two_rewards),
    "Train for beauty": ("more beautiful", train_in_background),
    "Train on what people pick": ("what people pick", train_in_background),
    "Train on what people prefer": ("as people prefer", train_in_background),
    "Train on your own taste": ("what you like", taste),
}


def drawn(family: str, words: str, picture: Callable[[Axes], None]) -> Figure:
    """One thumbnail."""
    figure = Figure(figsize=(SIDE, SIDE), dpi=DPI, facecolor=GROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")
    axes.add_patch(
        FancyBboxPatch((6.6, 8.75), 2.9, 0.85, boxstyle="round,pad=0.1", color="#3f789e")
    )
    word(axes, 8.05, 9.16, family, 24)  # the template browser has a word of its own on the left
    word(axes, 5, 0.85, words, 30)
    picture(axes)
    return figure


def rows_of_pictures(words: str, rows: dict[str, Path]) -> Figure:
    """A thumbnail of pictures that are there: the first four of each folder, the last framed."""
    figure = Figure(figsize=(SIDE, SIDE), dpi=DPI, facecolor=GROUND)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")
    word(axes, 5, 0.75, words, 30)
    high, across = 8.2 / len(rows), 2 if len(rows) == 1 else 4
    size = min(2.2, high - 0.75) if len(rows) > 1 else 3.6
    left = (10 - across * size - 0.2 * (across - 1)) / 2
    for i, (label, folder) in enumerate(rows.items()):
        top = 9.7 - high * i
        word(axes, 5, top - 0.25, label, 20, BEST if i == len(rows) - 1 else MUTED)
        for k, file in enumerate(sorted(folder.glob("*.png"))[:4]):
            x = left + k % across * (size + 0.2)
            y = top - 0.65 - size - k // across * (size + 0.2)
            with Image.open(file) as picture:
                axes.imshow(picture.convert("RGB"), extent=(x, x + size, y, y + size), zorder=1)
            if i == len(rows) - 1:
                edge = {"fill": False, "edgecolor": BEST, "linewidth": 3, "zorder": 2}
                axes.add_patch(Rectangle((x, y), size, size, **edge))
    axes.set(xlim=(0, 10), ylim=(0, 10))
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a thumbnail beside its workflow."""
    thumbnail = file.with_suffix(".jpg")
    figure.savefig(thumbnail, pil_kwargs={"quality": 88, "optimize": True})
    print(f"written: {thumbnail}")


if __name__ == "__main__":
    with rc_context({"font.family": "DejaVu Sans"}):
        if sys.argv[1:]:
            name, words, *given = sys.argv[1:]
            folders = {label: Path(folder) for label, folder in (g.split("=", 1) for g in given)}
            save(rows_of_pictures(words, folders), WORKFLOWS / f"{name}.json")
        else:
            for file in sorted(WORKFLOWS.glob("*.json")):
                family, _, kind = file.stem.partition(" - ")
                if family in FAMILIES:
                    save(drawn(FAMILIES[family], *KINDS[kind[2:]]), file)
