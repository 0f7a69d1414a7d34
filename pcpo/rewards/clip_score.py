"""CLIPScore: how near CLIP's embeddings of an image and of its prompt are.

Five papers and libraries define five scores under this name; `VARIANTS` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float32
from torch import Tensor, nn

from ..pretrained.clip import TEXT, VISION, Text, Vision, cosines
from ..pretrained.preprocess import Cropped, Prepared
from ..pretrained.shapes import CLIPS
from ..pretrained.tokenizers import clean_prompt, clip_tokenizer
from .network import NetworkReward


@dataclass(frozen=True, slots=True)
class Variant:
    """A definition of the score: scale * cosine.

    Attributes:
        source: who defines it.
        weights: the CLIP it is computed with, a key of the catalogue.
        scale: of the cosine.
        floor: whether a score below 0 counts as 0.
        prefix: put before the prompt.
        cleans: whether the prompt is cleaned as OpenAI's tokenizer does.
        preparation: of the image.
    """

    source: str
    weights: str = "clip_l"
    scale: float = 1.0
    floor: bool = False
    prefix: str = ""
    cleans: bool = False
    preparation: Cropped = field(default_factory=Cropped)


VARIANTS: dict[str, Variant] = {
    "cosine": Variant("Flow-Factory, and the cosine itself"),
    "torchmetrics": Variant("torchmetrics", scale=100.0, floor=True),
    "hessel": Variant(
        "Hessel et al. 2021, arXiv:2104.08718, in float32 where they use float16",
        weights="clip_b32",
        scale=2.5,
        floor=True,
        prefix="A photo depicts ",
        cleans=True,
        preparation=Cropped(corner="even"),
    ),
    "image_reward": Variant(
        "ImageReward's repository", cleans=True, preparation=Cropped(corner="even")
    ),
    "diffusion_nft": Variant(
        "DiffusionNFT, which resizes bilinearly",
        preparation=Cropped(corner="even", resampling="bilinear"),
    ),
}


@dataclass(frozen=True, eq=False)
class ClipScore(NetworkReward):
    """How well an image fits its prompt: as a cosine mostly 0.15 to 0.35.

    Attributes:
        weights: path of the CLIP; it is searched where None.
        variant: "cosine", "torchmetrics", "hessel", "image_reward" or "diffusion_nft": whose
            definition it is.

    Raises:
        ValueError: where there is no such variant.
    """

    name: ClassVar[str] = "clip_score"
    needs_prompt: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    unit: ClassVar[str] = "cosine"
    variant: str = "cosine"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; choose one of {', '.join(VARIANTS)}")
        super().__post_init__()

    @property
    def bounds(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (0.0 if self._how.floor else -self._how.scale), self._how.scale

    @property
    def _how(self) -> Variant:
        return VARIANTS[self.variant]

    @property
    def preparation(self) -> Cropped:
        return self._how.preparation

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {self._how.weights: (self.weights, VISION + TEXT)}

    @cached_property
    def _vision(self) -> Vision:
        key = self._how.weights
        return Vision(self.paths[key], CLIPS[key], self.dtype)

    @cached_property
    def _text(self) -> Text:
        key = self._how.weights
        tokens = clip_tokenizer(self.name, clean_prompt if self._how.cleans else None)
        return Text(self.paths[key], CLIPS[key], self.dtype, tokens)

    def modules(self) -> list[nn.Module]:
        return [self._vision.network, self._text.network]

    def settings(self) -> dict[str, Any]:
        return {"variant": self.variant}

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        texts = self._text([f"{self._how.prefix}{prompt}" for prompt in prompts])
        scores = self._how.scale * cosines(self._vision(prepared), texts)
        return scores.clamp(min=0) if self._how.floor else scores
