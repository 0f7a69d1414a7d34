"""Images of one prompt list at several gammas as one sheet: a row for each gamma, lengths in px."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...pcpo.pictures.captions import one_line
from ...pcpo.pictures.contact_sheet import BEST, GROUND, MAX_WIDTH, MIN_TILE, MUTED, TEXT, TILE
from ...pcpo.pictures.tensors import pictures_of
from ...pcpo.statistics.tables import markdown
from ..errors import NodeError

MOST_GAMMAS = 12
LARGEST = 10.0


def gammas_of(text: str) -> tuple[float, ...]:
    """The gammas that a text names, with commas between them.

    >>> gammas_of("0, 0.5,1")
    (0.0, 0.5, 1.0)
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        found = tuple(float(word) for word in words)
    except ValueError:
        found = ()
    if not found or len(found) > MOST_GAMMAS or not all(abs(g) <= LARGEST for g in found):
        raise NodeError(
            f"gammas is {text!r}; write 1 to {MOST_GAMMAS} numbers from -{LARGEST:g} to "
            f"{LARGEST:g} with commas between them, as 0, 0.5, 1, 1.5"
        )
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are on the sheet.

    Attributes:
        shown: width and height of an image.
        columns: images of a gamma.
    """

    shown: tuple[int, int]
    columns: int
    rows: int

    @property
    def gap(self) -> int:
        return max(6, self.shown[0] // 16)

    @property
    def text(self) -> int:
        """Height of the letters."""
        return max(12, min(22, self.shown[0] // 7))

    @property
    def label(self) -> int:
        """Width of the column with gammas and means."""
        return self.text * 8

    @property
    def band(self) -> int:
        """Height of a line below an image."""
        return self.text * 2

    @property
    def size(self) -> tuple[int, int]:
        wide = self.label + self.columns * (self.shown[0] + self.gap) + 2 * self.gap
        return wide, self.rows * (self.shown[1] + self.band + self.gap) + self.band + self.gap

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Upper left corner of an image."""
        x = self.label + self.gap + column * (self.shown[0] + self.gap)
        return x, self.band + self.gap + row * (self.shown[1] + self.band + self.gap)


def sheet(
    pixels: UInt8[Tensor, "gammas b 3 h w"],
    gammas: Sequence[float],
    scores: Float[Tensor, "gammas b"] | None,
    prompts: Sequence[str],
) -> Float[Tensor, "1 high wide 3"]:
    """Draw a row of images for each gamma, with its mean score; the best mean is marked.

    Args:
        scores: NaN where there is none; None without a reward.
        prompts: of each image of a gamma; each is written once, above its first image.
    """
    count, (height, width) = pixels.shape[1], pixels.shape[-2:]
    tile = max(MIN_TILE, min(TILE, MAX_WIDTH * 7 // 8 // count))
    scale = tile / max(width, height)
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    layout = Layout(shown, count, len(gammas))
    picture = Image.new("RGB", layout.size, GROUND)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(layout.text)
    _write_prompts(pen, font, layout, prompts)
    means = means_of(scores)
    best = best_of(means)
    for row, gamma in enumerate(gammas):
        _write_gamma(pen, layout, row, gamma, means[row] if means else None, row == best)
        for column in range(count):
            corner = layout.corner(row, column)
            drawn = pictures_of(pixels[row, column][None])[0]
            picture.paste(drawn.resize(shown, Image.Resampling.LANCZOS), corner)
            if scores is not None:
                value = scores[row, column].item()
                said = f"{value:.3f}" if math.isfinite(value) else "no score"
                at = corner[0], corner[1] + shown[1] + layout.text
                pen.text(at, said, MUTED, font, anchor="lm")
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


def _write_prompts(
    pen: ImageDraw.ImageDraw, font: Any, layout: Layout, prompts: Sequence[str]
) -> None:
    starts = [i for i in range(len(prompts)) if i == 0 or prompts[i] != prompts[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(prompts)], strict=True):
        room = (end - start) * (layout.shown[0] + layout.gap) - layout.gap
        x, y = layout.corner(0, start)
        line = one_line(prompts[start], font, room)
        pen.text((x, y - layout.band // 2 - 2), line, TEXT, font, anchor="lm")


def _write_gamma(
    pen: ImageDraw.ImageDraw,
    layout: Layout,
    row: int,
    gamma: float,
    mean: float | None,
    is_best: bool,
) -> None:
    y = layout.corner(row, 0)[1] + layout.shown[1] // 2
    large, font = (ImageFont.load_default(size) for size in (layout.text * 5 // 4, layout.text))
    colour = BEST if is_best else TEXT
    pen.text((layout.gap, y - layout.text), f"gamma {gamma:g}", colour, large, anchor="lm")
    if mean is not None and math.isfinite(mean):
        pen.text((layout.gap, y + layout.text), f"mean {mean:.3f}", colour, font, anchor="lm")


def means_of(scores: Float[Tensor, "gammas b"] | None) -> list[float]:
    """The mean score of each gamma's images, NaN where none has one; none without scores."""
    return [] if scores is None else scores.double().nanmean(dim=1).tolist()


def best_of(means: Sequence[float]) -> int | None:
    """The gamma with the highest mean, if there are two that differ."""
    known = [(mean, -row) for row, mean in enumerate(means) if math.isfinite(mean)]
    return -max(known)[1] if len({mean for mean, _ in known}) > 1 else None


def table(gammas: Sequence[float], means: Sequence[float]) -> str:
    """The means as Markdown."""
    rows = [[f"{gamma:g}", f"{mean:.4g}"] for gamma, mean in zip(gammas, means, strict=True)]
    return markdown(["gamma", "mean score"], rows, right=0)


def verdict(gammas: Sequence[float], means: Sequence[float], name: str, images: int) -> str:
    """One line on what the sheet shows."""
    best = best_of(means)
    if best is None:
        return f"{len(gammas)} gammas, {images} images each, from the same noise"
    each = ", ".join(f"{g:g}: {m:.3f}" for g, m in zip(gammas, means, strict=True))
    return f"{name} by gamma: {each}. Best of these is gamma {gammas[best]:g}."
