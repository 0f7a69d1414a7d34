"""LAION's aesthetic predictor, as DDPO trains on it: CLIP ViT-L/14's image embedding and a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from jaxtyping import Float32
from torch import Tensor, nn

from ..pretrained.clip import VISION, AffineHead, Vision
from ..pretrained.find import load
from ..pretrained.preprocess import Cropped, Prepared
from ..pretrained.shapes import CLIPS
from .network import NetworkReward


@dataclass(frozen=True, eq=False)
class Aesthetic(NetworkReward):
    """How beautiful people find an image, mostly 4 to 7; 5.2 for an embedding at random.

    Source: Schuhmann 2022, improved-aesthetic-predictor; Black et al. 2024 (DDPO), whose scorer
    computes in float32 what the original does in float16.

    Attributes:
        weights: path of the head; it is searched where None.
        clip: path of a CLIP ViT-L/14 or of its vision tower alone; it is searched where None.
    """

    name: ClassVar[str] = "aesthetic"
    differentiable: ClassVar[bool] = True
    unit: ClassVar[str] = "points"
    clip: str | None = None

    @property
    def preparation(self) -> Cropped:
        return Cropped()

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {"aesthetic_head": (self.weights, ()), "clip_l_vision": (self.clip, VISION)}

    @cached_property
    def _head(self) -> AffineHead:
        return AffineHead(load(self.paths["aesthetic_head"]))

    @cached_property
    def _vision(self) -> Vision:
        return Vision(self.paths["clip_l_vision"], CLIPS["clip_l_vision"], self.dtype)

    def modules(self) -> list[nn.Module]:
        return [self._vision.network, self._head]

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        return self._head(self._vision(prepared))
