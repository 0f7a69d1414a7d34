"""DDPO's JPEG rewards: the size of the image as a JPEG file, in kilobytes, with either sign."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..errors import versions_of
from ..pictures.tensors import Images, pictures_of
from ..scores import Scores
from .base import BatchReward


def jpeg_kilobytes(images: Images, quality: int) -> list[float]:
    """The size of each image as a JPEG file in units of 1000 bytes, at Pillow's subsampling."""
    sizes = []
    for picture in pictures_of(images):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return sizes


@dataclass(frozen=True)
class _Jpeg(BatchReward):
    """What both signs share."""

    unit: ClassVar[str] = "kB"
    sign: ClassVar[int]
    quality: int = 95
    divisor: float = 1.0

    def __post_init__(self) -> None:
        if self.quality not in range(1, 101):
            raise ValueError(f"quality is {self.quality}; a JPEG's is a whole number from 1 to 100")
        if not 0 < self.divisor < float("inf"):
            raise ValueError(f"divisor is {self.divisor}; it has to be above 0")

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        sizes = torch.tensor(jpeg_kilobytes(images, self.quality))
        return Scores(self.sign * sizes / self.divisor)

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: above all Pillow's encoder."""
        settings = {"quality": self.quality, "divisor": self.divisor}
        return {"reward": self.name, **settings, "versions": versions_of("pillow")}


class JpegIncompressibility(_Jpeg):
    """Reward large files: kB of the image as a JPEG (Black et al. 2024, DDPO).

    Attributes:
        quality: JPEG quality, 1 to 100; DDPO uses 95.
        divisor: kB for one unit of reward; 1 in DDPO, 500 in Flow-GRPO.
    """

    name: ClassVar[str] = "jpeg_incompressibility"
    bounds: ClassVar[tuple[float, float]] = (0.0, float("inf"))
    sign: ClassVar[int] = 1


class JpegCompressibility(_Jpeg):
    """Reward small files: minus the kB of the image as a JPEG (Black et al. 2024, DDPO).

    Attributes:
        quality: JPEG quality, 1 to 100; DDPO uses 95.
        divisor: kB for one unit of reward; 1 in DDPO, 500 in Flow-GRPO.
    """

    name: ClassVar[str] = "jpeg_compressibility"
    bounds: ClassVar[tuple[float, float]] = (float("-inf"), 0.0)
    sign: ClassVar[int] = -1
