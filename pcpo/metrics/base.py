"""What all metrics of image sets share: 8-bit images in, features or distances out.

Images are 8-bit RGB, shape (b, 3, h, w), as for rewards, so that a metric of images in memory is
that of the same images read from files.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from ..pictures.tensors import Images
from ..pretrained.preprocess import too_long

Embedded = Float32[Tensor, "b d"]


class Features(Protocol):
    """An encoder of images whose statistics are compared. Making one loads nothing.

    Attributes:
        name: of the distance computed from its features, a key of `FEATURES`.
        size: features per image.
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...

    def __call__(self, images: Images) -> Embedded:
        """Encode images of one size, on any device; the features are on the CPU."""
        ...

    def modules(self) -> list[nn.Module]:
        """The networks, loaded if they are not yet; empty if it computes without one."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: weights by hash, preparation, versions."""
        ...


def check_images(images: Tensor, least: int = 1) -> Images:
    """Check images, and return them.

    Raises:
        ValueError: unless they are 8-bit RGB, no longer than 64:1, with a shorter side of at least
            `least` pixels.
    """
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise ValueError(
            f"these are no images: a tensor of {images.dtype} and shape {shape}; give 8-bit RGB, "
            "uint8 of shape (b, 3, h, w)"
        )
    if min(shape[2:]) < least:
        raise ValueError(
            f"the images are {shape[3]}x{shape[2]} pixels and must have {least} on a side at "
            "least; give larger ones"
        )
    if why := too_long(shape[2], shape[3]):
        raise ValueError(f"{why}, which no network can look at; leave the image out")
    return images


def finite(rows: Tensor, what: str) -> Tensor:
    """Return `rows`, (b, d), if all are finite.

    Args:
        rows: (b, d).
        what: what the error calls them.

    Raises:
        ValueError: if some are infinite or NaN.
    """
    bad = (~torch.isfinite(rows)).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the {what} of image {bad[0]} of {len(rows)} in this batch are not all finite; leave "
            "the image out, or compute in float32"
        )
    return rows
