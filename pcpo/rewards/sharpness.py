"""How sharp a picture is: the variance of its Laplacian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..pictures.tensors import Images
from ..scores import Scores
from .analytic import Analytic, Pixels, luma

SMALLEST = 3
"""Smallest width and height in px: below it no pixel has four neighbours."""


def laplacian(grey: Float[Tensor, "b h w"]) -> Float[Tensor, "b h-2 w-2"]:
    """The four neighbours of each inner pixel minus four times itself."""
    across = grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    down = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1]
    return across + down - 4 * grey[:, 1:-1, 1:-1]


class Sharpness(Analytic):
    """The variance of the Laplacian of the grey image in 0 to 255, over its inner pixels.

    The focus measure of Pech-Pacheco et al. 2000 with the kernel that OpenCV uses. Photographs
    have hundreds to thousands; it grows with noise as with detail, and depends on the size.
    """

    name: ClassVar[str] = "sharpness"
    bounds: ClassVar[tuple[float, float]] = (0.0, (4 * 255.0) ** 2)
    unit: ClassVar[str] = "squared grey levels"

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """The sharpness of each image; an error if it is too small to have one."""
        height, width = images.shape[-2:]
        if min(height, width) >= SMALLEST:
            return super().measure(images, prompts)
        why = f"the image is {width}x{height}, and sharpness needs at least {SMALLEST}x{SMALLEST}"
        return Scores(torch.full((len(images),), float("nan")), errors=(why,) * len(images))

    def value(self, pixels: Pixels, prompts: Sequence[str]) -> Tensor:
        return laplacian(255 * luma(pixels)).flatten(1).var(1, correction=0)
