"""SDXL's conditioning, from CLIP-L and CLIP-G.

Shapes: b prompts; l tokens; d their width for the network; p the width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..embeds import Embeds
from ..errors import ModelError
from ..text.encoders import Clip
from ..text.files import clip_from_folder, encoders_in, load_clip
from ..text.header import TITLES, Kind
from ..text.tokenizers import clip_tokenizer
from ..weights import Weights
from .header import REMEDY


@dataclass(eq=False)
class TextEncoders:
    """The text encoders of an SDXL model.

    Attributes:
        clip_l: CLIP-L.
        clip_g: CLIP-G, whose projected pooled vector the network takes.
    """

    clip_l: Clip
    clip_g: Clip

    def check(self, width: int, pooled: int) -> None:
        """Refuse encoders that were not made for a network, by the widths of tokens and pooled
        vector.
        """
        given = self.clip_l.width + self.clip_g.width
        if (given, self.clip_g.pooled_width) != (width, pooled):
            raise ModelError(
                f"the network attends to prompt tokens {width} wide and takes a pooled vector of "
                f"{pooled}; these text encoders give {given} and {self.clip_g.pooled_width}: they "
                f"belong to different models; {REMEDY}"
            )

    def encode(self, prompts: list[str], layer: int) -> Embeds:
        """Hidden states of both CLIPs side by side, without the final norm, and CLIP-G's pooled
        vector.

        Args:
            prompts: one or more.
            layer: counted from the last, 1; SDXL was trained with 2.
        """
        small, large = self.clip_l.encode(prompts, layer), self.clip_g.encode(prompts, layer)
        tokens = torch.cat([small.hidden, large.hidden], dim=-1)
        return Embeds.from_encoder(prompts, tokens, large.pooled)


def encoders_from_folder(path: Path) -> TextEncoders:
    """The text encoders of a diffusers folder, float32, on the CPU."""

    def clip(kind: Kind, suffix: str) -> Clip:
        tokenizer = clip_tokenizer(kind, path / f"tokenizer{suffix}")
        return clip_from_folder(path / f"text_encoder{suffix}", tokenizer, kind, torch.float32)

    return TextEncoders(clip("clip_l", ""), clip("clip_g", "_2"))


def encoders_from_files(checkpoint: Weights, given: Sequence[Weights]) -> TextEncoders:
    """The text encoders of a checkpoint and of files beside it, float32, on the CPU.

    A given file replaces the same encoder of the checkpoint.
    """
    places = encoders_in(checkpoint, given)

    def clip(kind: Kind, *, is_projected: bool) -> Clip:
        weights, prefix = places[kind]
        what = f"{TITLES[kind]} in {weights.header.name}"
        tensors = weights.under(prefix, torch.float32)
        return load_clip(tensors, clip_tokenizer(kind), kind, what, is_projected=is_projected)

    return TextEncoders(clip("clip_l", is_projected=False), clip("clip_g", is_projected=True))
