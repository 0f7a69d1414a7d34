"""HPSv2 and HPSv2.1: a CLIP ViT-H/14 tuned on human preferences.

It differs from CLIPScore in more than its weights: pictures are padded and not cropped, prompts
are cleaned as open_clip does, and the file has open_clip's names.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from jaxtyping import Float32
from torch import Tensor, nn

from ...remedies import install
from ..errors import versions_of
from ..pretrained.clip import TEXT, VISION, Text, Vision, cosines
from ..pretrained.preprocess import Padded, Prepared
from ..pretrained.shapes import CLIPS
from ..pretrained.tokenizers import Tokenizer, clean_prompt, clip_tokenizer, has_ftfy
from .network import NetworkReward

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Hps(NetworkReward):
    """What both versions share."""

    needs_prompt: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    unit: ClassVar[str] = "cosine"
    legacy_no_antialias: bool = False

    @property
    def preparation(self) -> Padded:
        return Padded(antialias=not self.legacy_no_antialias)

    @property
    def files(self) -> Mapping[str, tuple[str | None, tuple[str, ...]]]:
        return {self.name: (self.weights, VISION + TEXT)}

    @cached_property
    def _vision(self) -> Vision:
        return Vision(self.paths[self.name], CLIPS[self.name], self.dtype)

    @cached_property
    def _text(self) -> Text:
        return Text(self.paths[self.name], CLIPS[self.name], self.dtype, self._tokens())

    def _tokens(self) -> Tokenizer:
        if not has_ftfy():
            log.warning(
                "the reward %r cleans prompts without the package ftfy, which is not installed: "
                "about one in a hundred is then read otherwise (typographic quotes, say); "
                "%s brings it",
                self.name,
                install("ftfy"),
            )
        return clip_tokenizer(self.name, clean_prompt)

    def modules(self) -> list[nn.Module]:
        return [self._vision.network, self._text.network]

    def settings(self) -> dict[str, Any]:
        """Whether, and with which version, ftfy cleans prompts."""
        return versions_of("ftfy")

    def judge(self, prepared: Prepared, prompts: Sequence[str]) -> Float32[Tensor, " b"]:
        return cosines(self._vision(prepared), self._text(prompts))


class HpsV2(_Hps):
    """Which image people prefer for a prompt, a cosine, mostly 0.18 to 0.36; tables have it x 100.

    Source: Wu et al. 2023, arXiv:2306.09341; neither logit scale nor prefix.

    Attributes:
        weights: path of the weight file; it is searched where None.
        legacy_no_antialias: resize as torchvision below 0.17 did, with which the published
            numbers were made.
    """

    name: ClassVar[str] = "hps_v2"


class HpsV21(_Hps):
    """HPSv2.1, the same network trained on better data.

    Attributes:
        weights: path of the weight file; it is searched where None.
        legacy_no_antialias: resize as torchvision below 0.17 did, with which the published
            numbers were made.
    """

    name: ClassVar[str] = "hps_v2_1"
