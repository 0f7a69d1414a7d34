"""Features of a fixed random network: a stand-in for Inception's that needs no download.

The distance is called "fd_random" and never FID: it separates sets of images by colours, edges
and textures, and knows nothing of what they show.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import versions_of
from ..pictures.tensors import Images
from ..pretrained.network import device_of, no_autocast
from ..pretrained.preprocess import interpolate
from .base import Embedded, check_images

SIDE = 64
"""Side of the square that an image is resized to, in pixels."""

SEED = 13
WIDTHS = (3, 16, 32, 80)
"""Channels before and after each layer."""


class RandomProjection:
    """Mean and deviation over the image of each channel of three random convolutions.

    Each is 5 x 5 with stride 2, without bias, with normal weights of variance 1 / inputs and a
    rectifier after it. The weights come from numpy's legacy generator, whose stream is frozen.
    """

    name: ClassVar[str] = "fd_random"
    size: ClassVar[int] = 2 * sum(WIDTHS[1:])

    @cached_property
    def _network(self) -> nn.ModuleList:
        random = np.random.RandomState(SEED)
        layers = nn.ModuleList()
        for narrow, wide in pairwise(WIDTHS):
            layer = nn.Conv2d(narrow, wide, 5, stride=2, bias=False)
            weight = random.standard_normal((wide, narrow, 5, 5)) / (25 * narrow) ** 0.5
            layer.weight = nn.Parameter(torch.from_numpy(weight.astype(np.float32)))
            layers.append(layer)
        return layers.eval().requires_grad_(False)

    def modules(self) -> list[nn.Module]:
        return [self._network]

    @torch.no_grad()
    def __call__(self, images: Images) -> Embedded:
        """Encode images of one size; their aspect ratio is not kept."""
        device = device_of(self._network)
        with no_autocast(device):
            pixels = check_images(images).to(device).float() / 127.5 - 1
            x = interpolate(pixels, SIDE, SIDE, "bilinear")
            parts: list[Tensor] = []
            for layer in self._network:
                x = functional.relu(layer(x))
                parts += [x.mean((2, 3)), x.flatten(2).std(2, correction=0)]
            return torch.cat(parts, 1).cpu()

    def fingerprint(self) -> dict[str, Any]:
        return {
            "features": self.name,
            "seed": SEED,
            "preparation": f"{SIDE}x{SIDE}-bilinear-antialias",
            "versions": versions_of("torch"),
        }
