"""Images as tensors of 8-bit pixels, and as pictures of PIL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from .files import eight_bit

Images = UInt8[Tensor, "b 3 h w"]
Pictures = Images | Sequence[Image.Image]
"""A batch of one size, or pictures of any size and mode."""


def pixels_of(picture: Image.Image) -> Images:
    """A picture as 8-bit RGB, shape (1, 3, h, w); alpha is dropped, grey becomes three channels."""
    data = bytearray(eight_bit(picture).tobytes())
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2)


def pictures_of(images: Images) -> list[Image.Image]:
    """Convert images to pictures, exactly."""
    rows = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(pixels) for pixels in rows]
