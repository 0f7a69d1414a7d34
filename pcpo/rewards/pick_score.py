"""PickScore: a CLIP ViT-H/14 tuned on which of two images people picked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float32
from torch import Tensor, nn

from ..pretrained.clip import Text, Vision, cosines
from ..pretrained.find import part_of
from ..pretrained.preprocess import Cropped, Prepared
from ..pretrained.shapes import CLIPS
from ..pretrained.tokenizers import clip_tokenizer
from .network import NetworkReward

SCALES = ("raw", "/26", "cosine")
"""PickScore's own; Flow-GRPO's; without CLIP's logit scale, as DanceGRPO has it."""


@dataclass(frozen=True, eq=False)
class PickScore(NetworkReward):
    """Which image people would pick for a prompt: mostly 18 to 24 raw.

    Source: Kirstain et al. 2023, arXiv:2305.01569: exp(logit scale) * cosine, with transformers'
    tokenizer and no prefix.

    Attributes:
        weights: path of the weight file or folder; it is searched where None.
        normalise: "raw", "/26" (Flow-GRPO) or "cosine" (DanceGRPO).

    Raises:
        ValueError: where there is no such scale.
    """

    name: ClassVar[str] = "pick_score"
    needs_prompt: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    unit: ClassVar[str] = "PickScore"
    normalise: str = "raw"

    def __post_init__(self) -> None:
        if self.normalise not in SCALES:
            raise ValueError(f"normalise is {self.normalise!r}; choose one of {', '.join(SCALES)}")
        super().__post_init__()

    @property
    def bounds(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A cosine's, or none: the scale is in the weight file."""
        return (-1.0, 1.0) if self.normalise == "cosine" else (float("-inf"), float("inf"))

    @property
    def preparation(self) -> Cropped:
        return Cropped()

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {"pick_score": (self.weights, ())}

    @cached_property
    def _vision(self) -> Vision:
        return Vision(self.paths["pick_score"], CLIPS["pick_score"], self.dtype)

    @cached_property
    def _text(self) -> Text:
        tokens = clip_tokenizer(self.name)
        return Text(self.paths["pick_score"], CLIPS["pick_score"], self.dtype, tokens)

    @cached_property
    def _scale(self) -> float:
        if self.normalise == "cosine":
            return 1.0
        logit = part_of(self.paths["pick_score"], "logit_scale")["logit_scale"]
        return logit.double().exp().item() / (26 if self.normalise == "/26" else 1)

    def modules(self) -> list[nn.Module]:
        return [self._vision.network, self._text.network]

    def settings(self) -> dict[str, Any]:
        return {"normalise": self.normalise}

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        return self._scale * cosines(self._vision(prepared), self._text(prompts))
