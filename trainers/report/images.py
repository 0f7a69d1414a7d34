"""Images as files and as contact sheets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...pcpo.pictures.captions import one_line
from ...pcpo.pictures.files import BadPicture, open_picture
from ...pcpo.pictures.tensors import pixels_of
from ..job.files import replace_file
from ..job.folder import JobError, JobFolder
from ..job.metrics import is_number
from .page_images import finished_samples

Images = UInt8[Tensor, "b 3 h w"]


def to_pil(pixels: UInt8[Tensor, "3 h w"]) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_images(images: Images, folder: Path) -> list[Path]:
    """Write 000.png, 001.png, ... into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i:03}.png" for i in range(len(images))]
    for pixels, file in zip(images, files, strict=True):
        to_pil(pixels).save(file)
    return files


def load_images(files: Sequence[Path]) -> Images:
    """Read images of one size back; `JobError` if one cannot be read."""
    pixels = []
    for file in files:
        try:
            pixels.append(pixels_of(open_picture(file)))
        except BadPicture as error:
            raise JobError(f"{file} cannot be read as an image: {error}") from error
    return torch.cat(pixels)


def before_after(folder: JobFolder, *, tile: int = 160, columns: int = 4) -> None:
    """Draw `before_after.png`: the first and the last samples, with their prompts and rewards.

    Nothing is drawn before there are two.

    Args:
        tile: side of one image on the sheet, px.
    """
    sampled = finished_samples(folder)
    if len(sampled) < 2:
        return
    first, last = sampled[0], sampled[-1]
    pairs = list(zip(folder.scores(int(first.name)), folder.scores(int(last.name)), strict=False))
    band, gap = 44, 10
    cell_width, cell_height = 2 * tile + 4 + gap, tile + band
    rows = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, scores in enumerate(pairs):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        for place, offset in ((first, 0), (last, tile + 4)):
            with suppress(BadPicture):  # someone removed it
                picture = open_picture(place / f"{i:03}.png")
                sheet.paste(picture.resize((tile, tile), Image.Resampling.LANCZOS), (x + offset, y))
        prompt, before, after = str(scores[1].get("prompt", "")), *map(_reward, scores)
        draw.text((x, y + tile + 2), one_line(prompt, font, 2 * tile), fill="black")
        colour = "#0a7d32" if after > before else "#b3261e" if after < before else "#555555"
        draw.text((x, y + tile + 18), f"before {before:.2f}", fill="#555555")
        draw.text((x + tile + 4, y + tile + 18), f"after {after:.2f}", fill=colour)
    with replace_file(folder.report / "before_after.png") as fresh:
        sheet.save(fresh, "PNG")


def _reward(score: Mapping[str, Any]) -> float:
    """Of a line of scores.json; NaN if it is no number."""
    return value if is_number(value := score.get("reward")) else math.nan
