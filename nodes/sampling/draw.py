"""Drawing: the paper's Figure 2, and the way from noise to image as a row of frames."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...pcpo.credit import Credit
from ...pcpo.credit_shown import draw_credit
from ...pcpo.pictures.contact_sheet import GROUND, MUTED, TEXT, grid_of
from ...remedies import install
from ..errors import NodeError
from ..host import Grid

SIZE, DPI = (11.0, 4.2), 110
"""Inches of the figure, and px an inch."""


def weights_figure(
    grid: Grid, native: Credit, credited: Credit, title: str
) -> Float[Tensor, "1 height width 3"]:
    """Native weights of each step, its credit and true weight, and the noise (paper's Figure 2).

    Returns:
        The picture, 0 to 1.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NodeError(
            f"the picture needs matplotlib, which ComfyUI's Python lacks; run "
            f"{install('matplotlib')} and start ComfyUI again"
        ) from error
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw_credit(figure, grid, native, credited, title)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]


def strip(
    frames: UInt8[Tensor, "n height width 3"], labels: list[tuple[str, str]]
) -> Float[Tensor, "1 high wide 3"]:
    """Frames of one image in reading order, each with what it is below it.

    Args:
        labels: two short texts a frame, for the left and the right end below it.

    Returns:
        The sheet, 0 to 1.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, height, width = frames.shape[:3]
    places = grid_of(count, width, height)
    sheet = Image.new("RGB", places.size, GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(places.text)
    for i, (left, right) in enumerate(labels):
        x, y = places.corner(i)
        picture = Image.fromarray(np.ascontiguousarray(frames[i].numpy()))
        picture = picture.resize(places.shown, Image.Resampling.LANCZOS)
        sheet.paste(picture, (x + (places.cell - places.shown[0]) // 2, y))
        middle = y + places.shown[1] + places.band // 2 + 1
        draw.text((x, middle), left, TEXT, font, anchor="lm")
        draw.text((x + places.cell, middle), right, MUTED, font, anchor="rm")
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]
