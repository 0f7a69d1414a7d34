"""SD3's conditioning, from two CLIPs and T5.

A missing encoder is treated as in ComfyUI: zeros for a CLIP, nothing for T5.
Shapes: b prompts; l tokens; d their width for the network; p the width of the pooled vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from ..embeds import Embeds
from ..errors import ModelError
from ..text.encoders import T5, Clip, ClipStates
from ..text.files import clip_from_folder, encoders_in, load_clip, load_t5, part_tensors
from ..text.header import TITLES, Kind
from ..text.tokenizers import clip_tokenizer, t5_tokenizer
from ..weights import Weights


@dataclass(eq=False)
class TextEncoders:
    """The text encoders of an SD3 model; at least one.

    Attributes:
        clip_l: CLIP-L, or None.
        clip_g: CLIP-G, or None.
        t5: T5-XXL, or None.
    """

    clip_l: Clip | None
    clip_g: Clip | None
    t5: T5 | None

    @property
    def missing(self) -> list[str]:
        """Names of the missing encoders."""
        return [TITLES[kind] for kind, encoder in self._encoders.items() if encoder is None]

    @property
    def _encoders(self) -> dict[Kind, Clip | T5 | None]:
        return {"clip_l": self.clip_l, "clip_g": self.clip_g, "t5": self.t5}

    @property
    def _counting_tokenizer(self) -> Clip | T5:
        encoder = self.t5 or self.clip_l or self.clip_g
        assert encoder is not None
        return encoder

    def is_whole(self, pooled: int) -> bool:
        """Whether the network was made for just these encoders, as the demo's was for CLIP-L.

        `pooled` is the width of the pooled vector that the network takes.
        """
        clips = [clip for clip in (self.clip_l, self.clip_g) if clip is not None]
        return not self.missing or (
            len(clips) < 2 and sum(clip.pooled_width for clip in clips) == pooled
        )

    def check(self, width: int, pooled: int) -> None:
        """Refuse encoders that were not made for a network, by the widths of tokens and pooled
        vector.
        """
        if len(self.missing) == len(self._encoders):
            raise ModelError("the model has no text encoder: give CLIP-L, CLIP-G and T5-XXL")
        clips = [clip for clip in (self.clip_l, self.clip_g) if clip is not None]
        given = sum(clip.pooled_width for clip in clips)
        if given > pooled or (len(clips) == 2 and given != pooled):
            raise ModelError(
                f"the CLIP text encoders give a pooled vector of {given} and the network takes "
                f"{pooled}: they belong to different models; SD3 takes CLIP-L, CLIP-G and T5-XXL"
            )
        tokens = self.t5.width if self.t5 is not None else width
        if tokens != width or sum(clip.width for clip in clips) > width:
            raise ModelError(
                f"the network attends to prompt tokens {width} wide, and T5 gives {tokens}, the "
                f"CLIPs {sum(clip.width for clip in clips)}: they belong to different models; SD3 "
                "takes CLIP-L, CLIP-G and T5-XXL"
            )

    def length(self, t5_length: int) -> int:
        """Tokens taken of a prompt, by the encoder that `count` uses."""
        encoder = self._counting_tokenizer
        return t5_length if isinstance(encoder, T5) else encoder.length

    def count(self, prompt: str) -> int:
        """Tokens of a prompt for T5, or for CLIP if there is no T5."""
        return self._counting_tokenizer.count(prompt)

    @property
    def modules(self) -> list[nn.Module]:
        """The networks of those that are there."""
        return [one.model for one in self._encoders.values() if one is not None]

    def encode(self, prompts: list[str], width: int, pooled: int, t5_length: int) -> Embeds:
        """Encode prompts.

        Args:
            width: of a token for the network.
            pooled: width of the pooled vector.
            t5_length: tokens of every prompt for T5.

        Returns:
            Both CLIPs' hidden states side by side, padded with zeros to `width`, then T5's; and
            the pooled vectors of CLIP-L and CLIP-G.
        """
        l_states = None if self.clip_l is None else self.clip_l.encode(prompts)
        g_states = None if self.clip_g is None else self.clip_g.encode(prompts)
        tokens: list[Tensor] = []
        if l_states is not None or g_states is not None:
            tokens.append(_side_by_side(l_states, g_states, width, pooled))
        if self.t5 is not None:
            tokens.append(self.t5.encode(prompts, t5_length))
        vector = tokens[0].new_zeros(len(prompts), pooled)
        if l_states is not None:
            vector[:, : l_states.pooled.shape[1]] = l_states.pooled
        if g_states is not None:
            vector[:, pooled - g_states.pooled.shape[1] :] = g_states.pooled
        return Embeds.from_encoder(prompts, torch.cat(tokens, dim=1), vector)


def _side_by_side(
    l_states: ClipStates | None, g_states: ClipStates | None, width: int, pooled: int
) -> Float[Tensor, "b l d"]:
    if g_states is None:
        assert l_states is not None
        both = l_states.hidden
    elif l_states is None:
        both = pad(g_states.hidden, (pooled - g_states.pooled.shape[1], 0))
    else:
        both = torch.cat([l_states.hidden, g_states.hidden], dim=-1)
    return pad(both, (0, width - both.shape[-1]))


# --- loading -------------------------------------------------------------------------------------


def encoders_from_folder(path: Path, t5_dtype: torch.dtype) -> TextEncoders:
    """The text encoders of a diffusers folder that are there, on the CPU; the CLIPs are float32."""

    def clip(kind: Kind, suffix: str) -> Clip | None:
        part = path / f"text_encoder{suffix}"
        if not part.is_dir():
            return None
        tokenizer = clip_tokenizer(kind, path / f"tokenizer{suffix}")
        return clip_from_folder(part, tokenizer, kind, torch.float32)

    third = path / "text_encoder_3"
    t5 = None
    if third.is_dir():
        tokenizer = t5_tokenizer(path / "tokenizer_3")
        t5 = load_t5(part_tensors(third, t5_dtype), tokenizer, f"the text encoder in {third}")
    return TextEncoders(clip("clip_l", ""), clip("clip_g", "_2"), t5)


def encoders_from_files(
    checkpoint: Weights, given: Sequence[Weights], tokenizer: Path | None, t5_dtype: torch.dtype
) -> TextEncoders:
    """The text encoders of a checkpoint and of files beside it that are there, on the CPU.

    A given file replaces the same encoder of the checkpoint. The CLIPs are float32.
    """
    places = encoders_in(checkpoint, given)

    def clip(kind: Kind, is_projected: bool) -> Clip | None:
        if kind not in places:
            return None
        weights, prefix = places[kind]
        what = f"{TITLES[kind]} in {weights.header.name}"
        tensors = weights.under(prefix, torch.float32)
        return load_clip(tensors, clip_tokenizer(kind), kind, what, is_projected=is_projected)

    t5 = None
    if "t5" in places:
        weights, prefix = places["t5"]
        found_tokenizer = t5_tokenizer(tokenizer)  # before gigabytes are read
        t5 = load_t5(
            weights.under(prefix, t5_dtype), found_tokenizer, f"T5 in {weights.header.name}"
        )
    # CLIP-L's projection is no part of SD3, although files have it: its pooled vector is plain
    return TextEncoders(clip("clip_l", False), clip("clip_g", True), t5)
