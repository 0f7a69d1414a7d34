"""DINOv2 ViT-L/14, whose features show better than Inception's what people see.

Source: Oquab et al. 2023, arXiv:2304.07193; as a metric Stein et al. 2023, arXiv:2306.04675
(dgm-eval). This is the authors' network: it stretches the 37 x 37 trained positions to 16 x 16 by
the factor 16.1 / 37, not to the size. transformers stretches to the size, which moves the positions
by several per cent and so changes the distances.

Shapes: b images, t tokens of width d, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import nn

from ..pictures.tensors import Images
from ..pretrained.dinov2 import SPECS, VisionTransformer
from ..pretrained.network import device_of
from ..pretrained.preprocess import IMAGENET, Stretched
from .base import Embedded, check_images
from .weighted import Weighted, exactly

SIDE = 224


@dataclass(frozen=True, eq=False)
class Dinov2(Weighted):
    """The features of FD-DINOv2, as dgm-eval has them."""

    name: ClassVar[str] = "fd_dinov2"

    @property
    def size(self) -> int:
        return SPECS["dinov2_large"].width

    @property
    def files(self) -> Mapping[str, str | None]:
        return {"dinov2_large": self.weights}

    @property
    def preparation(self) -> str:
        """dgm-eval's: the aspect ratio is not kept."""
        return f"{SIDE}x{SIDE}-bicubic-antialias-imagenet"

    @cached_property
    def _network(self) -> nn.Module:
        return self.network("dinov2_large", lambda: VisionTransformer(SPECS["dinov2_large"]))

    def modules(self) -> list[nn.Module]:
        return [self._network]

    def __call__(self, images: Images) -> Embedded:
        """The features of images of one size; on the CPU they are resized by Pillow, exactly."""
        device = device_of(self._network)
        with exactly(device):
            prepared = Stretched(SIDE, *IMAGENET)(check_images(images).to(device))
            return self._network(prepared).cpu()
