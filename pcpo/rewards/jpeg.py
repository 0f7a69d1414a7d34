"""DDPO's JPEG rewards: the size of the image as a JPEG file, in kilobytes, with either sign."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from . import Images, Scores


def jpeg_kilobytes(images: Images, quality: int) -> list[float]:
    """The size of each image as a JPEG file in units of 1000 bytes, at Pillow's subsampling."""
    sizes = []
    for pixels in images.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return sizes


@dataclass(frozen=True, slots=True)
class JpegIncompressibility:
    """Reward large files: kB of the image as a JPEG (Black et al. 2024, DDPO).

    Attributes:
        quality: JPEG quality, 1 to 100; DDPO uses 95.
        divisor: kB for one unit of reward; 1 in DDPO, 500 in Flow-GRPO.
    """

    name: ClassVar[str] = "jpeg_incompressibility"
    needs_prompt: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    quality: int = 95
    divisor: float = 1.0

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score each image by its size; the prompts are not used."""
        return Scores(torch.tensor(jpeg_kilobytes(images, self.quality)) / self.divisor)


@dataclass(frozen=True, slots=True)
class JpegCompressibility:
    """Reward small files: minus the kB of the image as a JPEG (Black et al. 2024, DDPO).

    Attributes:
        quality: JPEG quality, 1 to 100; DDPO uses 95.
        divisor: kB for one unit of reward; 1 in DDPO, 500 in Flow-GRPO.
    """

    name: ClassVar[str] = "jpeg_compressibility"
    needs_prompt: ClassVar[bool] = False
    bounds: ClassVar[tuple[float, float]] = (float("-inf"), 0.0)
    quality: int = 95
    divisor: float = 1.0

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score each image by its size; the prompts are not used."""
        return Scores(-torch.tensor(jpeg_kilobytes(images, self.quality)) / self.divisor)
