"""Images as files and as contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...pcpo.pictures.captions import one_line
from ...pcpo.pictures.files import BadPicture, open_picture
from ...pcpo.pictures.tensors import pixels_of
from ..job.folder import JobError

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


def before_after(
    before: Images,
    after: Images,
    prompts: Sequence[str],
    scores: Sequence[tuple[float, float]],
    file: Path,
    *,
    tile: int = 160,
    columns: int = 4,
) -> None:
    """Draw pairs at equal prompts and seeds, each with its prompt and its two rewards.

    Args:
        before: images of the base model.
        after: images of the trained model.
        prompts: of each pair.
        scores: rewards (before, after) of each pair.
        file: the PNG.
        tile: side of one image on the sheet, px.
        columns: pairs in a row.
    """
    band, gap = 44, 10
    cell_width, cell_height = 2 * tile + 4 + gap, tile + band
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for i, prompt in enumerate(prompts):
        x, y = gap + i % columns * cell_width, gap + i // columns * cell_height
        for pixels, offset in ((before[i], 0), (after[i], tile + 4)):
            sheet.paste(
                to_pil(pixels).resize((tile, tile), Image.Resampling.LANCZOS), (x + offset, y)
            )
        first, second = scores[i]
        draw.text((x, y + tile + 2), one_line(prompt, font, 2 * tile), fill="black")
        colour = "#0a7d32" if second > first else "#b3261e" if second < first else "#555555"
        draw.text((x, y + tile + 18), f"before {first:.2f}", fill="#555555")
        draw.text((x + tile + 4, y + tile + 18), f"after {second:.2f}", fill=colour)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)
