"""A job's curves and samples as ComfyUI's images, drawn with Pillow.

All lengths are in px of the picture before it is scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...pcpo.pictures.captions import one_line
from ...pcpo.pictures.contact_sheet import GROUND, MUTED, TEXT
from ...pcpo.pictures.files import BadPicture, open_picture

Lines = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""

SCALE = 2
"""A picture is drawn this much larger, so that its lines are smooth."""
SIZE, FONT, DOT = (960, 400), 13, 3.5
LEFT, TOP, RIGHT, BOTTOM = 64, 64, 20, 40
"""Around a plot."""
LINE, BAND, HELD_OUT, CLIPPED = "#6fdc9d", "#4a5a52", "#ffb454", "#7fb4ff"


@dataclass(frozen=True, slots=True)
class Frame:
    """Place of a plot, and the range of its axes.

    Attributes:
        x: values at the left and right end.
        y: values at the bottom and top.
    """

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, point: tuple[float, float]) -> tuple[float, float]:
        """Where a point is drawn."""
        left, top, right, bottom = self.box
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def curves(metrics: Lines, before: float | None, title: str) -> Float[Tensor, "1 height width 3"]:
    """Reward and clipped share of a job by iteration.

    Args:
        before: mean held-out reward before training, where it was measured.

    Returns:
        The picture, 0 to 1.
    """
    width, height = SIZE[0] * SCALE, SIZE[1] * SCALE
    picture = Image.new("RGB", (width, height), GROUND)
    draw = ImageDraw.Draw(picture)
    draw.text(
        (width / 2, 12 * SCALE), one_line(title, _font(16), width), TEXT, _font(16), anchor="mt"
    )
    _draw_reward(draw, metrics, before)
    _draw_clipped(draw, metrics)
    small = picture.resize(SIZE, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).astype(np.float32) / 255)[None]


def _draw_reward(draw: ImageDraw.ImageDraw, metrics: Lines, before: float | None) -> None:
    means, spread = points(metrics, "reward"), dict(points(metrics, "reward_std"))
    low = [(x, y - spread.get(x, 0.0)) for x, y in means]
    high = [(x, y + spread.get(x, 0.0)) for x, y in means]
    held_out = points(metrics, "held_out")
    if before is not None and math.isfinite(before):
        held_out = [(0.0, before), *held_out]
    frame = _frame(0, metrics, _limits([y for _, y in (*low, *high, *held_out)]))
    if len(low) > 1:
        draw.polygon([frame.at(point) for point in (*low, *reversed(high))], fill=BAND)
    _axes(draw, frame, "reward: mean and spread")
    _plot(draw, frame, means, LINE)
    _plot(draw, frame, held_out, HELD_OUT, has_dots=True)
    _legend(draw, frame, (("while training", LINE), ("held out", HELD_OUT)))


def _draw_clipped(draw: ImageDraw.ImageDraw, metrics: Lines) -> None:
    shares = points(metrics, "clip_fraction")
    frame = _frame(SIZE[0] // 2, metrics, (0.0, max([0.1, *(y for _, y in shares)])))
    _axes(draw, frame, "share of steps that is clipped")
    _plot(draw, frame, shares, CLIPPED)


def points(metrics: Lines, name: str) -> list[tuple[float, float]]:
    """A quantity by iteration, where it is a finite number."""
    found = [(line["iteration"], line.get(name)) for line in metrics]
    return [(float(x), float(y)) for x, y in found if y is not None and math.isfinite(y)]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: a little beyond the values, and never the same."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    edge = 0.05 * (high - low) or max(0.05 * abs(high), 0.5)
    return low - edge, high + edge


def _frame(left: int, metrics: Lines, y: tuple[float, float]) -> Frame:
    right = left + SIZE[0] // 2 - RIGHT
    edges = (left + LEFT, TOP, right, SIZE[1] - BOTTOM)
    box = (edges[0] * SCALE, edges[1] * SCALE, edges[2] * SCALE, edges[3] * SCALE)
    return Frame(box, (0.0, max([1.0, *(line["iteration"] for line in metrics)])), y)


def _axes(draw: ImageDraw.ImageDraw, frame: Frame, title: str) -> None:
    left, top, right, bottom = frame.box
    font, gap = _font(FONT), 6 * SCALE
    draw.rectangle(frame.box, outline=MUTED, width=SCALE)
    draw.text((left, top - gap), title, TEXT, font, anchor="lb")
    for value in (frame.y[0], sum(frame.y) / 2, frame.y[1]):
        y = frame.at((0.0, value))[1]
        draw.text((left - gap, y), f"{value:.3g}", MUTED, font, anchor="rm")
    for value, x in ((frame.x[0], left), (frame.x[1], right)):
        draw.text((x, bottom + gap), f"{value:g}", MUTED, font, anchor="mt")
    draw.text(((left + right) / 2, bottom + gap), "iteration", MUTED, font, anchor="mt")


def _plot(
    draw: ImageDraw.ImageDraw,
    frame: Frame,
    line: Sequence[tuple[float, float]],
    colour: str,
    has_dots: bool = False,
) -> None:
    places = [frame.at(point) for point in line]
    if len(places) > 1:
        draw.line(places, fill=colour, width=2 * SCALE, joint="curve")
    size = DOT * SCALE
    for x, y in places if has_dots or len(places) == 1 else ():
        draw.ellipse((x - size, y - size, x + size, y + size), fill=colour)


def _legend(draw: ImageDraw.ImageDraw, frame: Frame, entries: Sequence[tuple[str, str]]) -> None:
    _, top, x, _ = frame.box
    for text, colour in reversed(entries):
        draw.text((x, top - 6 * SCALE), text, colour, _font(FONT), anchor="rb")
        x -= draw.textlength(text, _font(FONT)) + 14 * SCALE


def _font(size: int) -> Any:
    return ImageFont.load_default(size * SCALE)


# --- samples -------------------------------------------------------------------------------------


def latest_samples(folder: Path) -> Float[Tensor, "b height width 3"] | None:
    """The images of the last sampled iteration, 0 to 1; None where there are none yet."""
    places = [p for p in folder.iterdir() if p.name.isdecimal()] if folder.is_dir() else []
    for place in sorted(places, key=lambda place: int(place.name), reverse=True):
        files = sorted(place.glob("*.png"))
        if files and (place / "scores.json").is_file():  # which is written last
            with suppress(BadPicture):
                pixels = [np.asarray(open_picture(file)) for file in files]
                return torch.from_numpy(np.stack(pixels).astype(np.float32) / 255)
    return None
