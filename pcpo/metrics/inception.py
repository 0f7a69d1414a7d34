"""Inception-2015, the network of FID and of the Inception Score, as it was in TensorFlow.

Source: Szegedy et al. 2016, arXiv:1512.00567, in the file of 2015-12-05 that Salimans et al. 2016
and Heusel et al. 2017 used. It is not torchvision's: it has 1008 classes, its average pools do
not count the border, and the last of them is a maximum. Images are prepared as torch-fidelity
does; pytorch-fid and dgm-eval scale and resize otherwise, and get slightly other numbers.

A block is a list of branches whose outputs are joined; a branch is a list of convolutions and
pools; a pair of convolutions within one is a fork whose two outputs are joined.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from ..pictures.tensors import Images
from ..pretrained.inception2015 import SIDE, Inception2015
from ..pretrained.network import device_of
from .base import Embedded, check_images
from .weighted import Weighted, exactly


def resized_as_tensorflow(images: Float32[Tensor, "b 3 h w"], side: int) -> Tensor:
    """Resize images linearly to a square, (b, 3, side, side), as TensorFlow 1 does.

    Output place i reads the input at i times in / out, with no half pixel and no antialiasing.
    """
    for axis in (3, 2):
        length = images.shape[axis]
        scale = torch.tensor(length / side, dtype=torch.float32, device=images.device)
        at = torch.arange(side, dtype=torch.float32, device=images.device) * scale
        low = at.long()
        high = (low + 1).clamp_max(length - 1)
        share = (at - low).view(-1, *[1] * (3 - axis))
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, high) - first) * share
    return images


@dataclass(frozen=True, eq=False)
class Inception(Weighted):
    """The features of FID, and the logits of the Inception Score, from one pass."""

    name: ClassVar[str] = "fid"
    size: ClassVar[int] = 2048

    @property
    def files(self) -> Mapping[str, str | None]:
        return {"inception_2015": self.weights}

    @property
    def preparation(self) -> str:
        """torch-fidelity's."""
        return f"{SIDE}x{SIDE}-bilinear-tensorflow1-minus128-by128"

    @cached_property
    def _network(self) -> nn.Module:
        return self.network("inception_2015", Inception2015)

    def modules(self) -> list[nn.Module]:
        return [self._network]

    def both(self, images: Images) -> tuple[Embedded, Float32[Tensor, "b 1008"]]:
        """Features and logits (without the last layer's bias) of images of one size, on the CPU."""
        device = device_of(self._network)
        with exactly(device):
            pixels = resized_as_tensorflow(check_images(images).to(device).float(), SIDE)
            features, logits = self._network((pixels - 128) / 128)
            return features.cpu(), logits.cpu()

    def __call__(self, images: Images) -> Embedded:
        return self.both(images)[0]
