"""What rewards that are one formula of the pixels, and so have an exact gradient, share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import versions_of
from ..pictures.tensors import Images
from ..scores import Scores
from .base import BatchReward

Pixels = Float[Tensor, "b 3 h w"]

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601: the shares of R, G and B (as stored) in the grey that Pillow and OpenCV make."""


def luma(pixels: Pixels) -> Float[Tensor, "b h w"]:
    """The grey of each pixel, on the scale of the pixels."""
    return torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(LUMA))


class Analytic(BatchReward):
    """A reward given by `value`, a formula of the pixels."""

    differentiable: ClassVar[bool] = True

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """The formula at 8-bit images, in float32."""
        with torch.no_grad():
            return Scores(self.value(images.float() / 255, prompts).cpu())

    def fingerprint(self) -> dict[str, Any]:
        options = asdict(self) if is_dataclass(self) else {}
        return {"reward": self.name, **options, "versions": versions_of("torch")}
