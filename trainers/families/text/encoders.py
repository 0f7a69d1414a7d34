"""Text encoders: CLIP-L, CLIP-G and T5 (`text_file` loads them).

Shapes: b prompts; l tokens; d the encoder's width; p the width of a pooled vector.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from ..errors import ModelError
from .header import TITLES

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClipStates:
    """CLIP's outputs for some prompts, float32.

    Attributes:
        last: hidden states after the last layer and the final norm.
        hidden: hidden states after an earlier layer, without the norm.
        pooled: `last` at the first end-of-text token, projected if the encoder is set to.
    """

    last: Float[Tensor, "b l d"]
    hidden: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"]


@dataclass(eq=False)
class Clip:
    """A CLIP text encoder with its tokenizer.

    Attributes:
        model: the encoder; its projection is the identity if the file had none.
        tokenizer: pads as the encoder was trained: CLIP-L with the end token, CLIP-G with 0.
        is_projected: the pooled vector goes through the projection.
    """

    model: CLIPTextModelWithProjection
    tokenizer: Any
    title: str
    is_projected: bool

    def __post_init__(self) -> None:
        check_vocabulary(self.tokenizer, self.model.config, self.title)

    @property
    def width(self) -> int:
        """Length of one token's vector."""
        return self.model.config.hidden_size

    @property
    def pooled_width(self) -> int:
        """Length of the pooled vector."""
        return self.model.text_projection.out_features if self.is_projected else self.width

    @property
    def length(self) -> int:
        """Tokens that the encoder takes: 77."""
        return self.model.config.max_position_embeddings

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, including start and end."""
        return len(self.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def encode(self, prompts: list[str], layer: int = 2) -> ClipStates:
        """Hidden states and pooled vectors of prompts, padded to the encoder's length.

        A prompt that is too long is cut, and that is logged. `layer`, of the hidden states, is
        counted from the last, 1.
        """
        ids = _tokens(self, prompts, self.length).to(self.model.device)
        model: Any = self.model
        out = model(ids, output_hidden_states=True)
        ends = (ids == self.tokenizer.eos_token_id).int().argmax(dim=-1)
        pooled = out.last_hidden_state[torch.arange(len(ids), device=ids.device), ends]
        if self.is_projected:
            pooled = model.text_projection(pooled)
        last, hidden = out.last_hidden_state, out.hidden_states[-layer]
        return ClipStates(last.float(), hidden.float(), pooled.float())


@dataclass(eq=False)
class T5:
    """The encoder half of a T5 with its tokenizer.

    Attributes:
        tokenizer: pads with 0.
    """

    model: T5EncoderModel
    tokenizer: Any
    title: str = TITLES["t5"]

    def __post_init__(self) -> None:
        check_vocabulary(self.tokenizer, self.model.config, self.title)

    @property
    def width(self) -> int:
        """Length of one token's vector."""
        return self.model.config.d_model

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, including the end."""
        return len(self.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def encode(self, prompts: list[str], length: int) -> Float[Tensor, "b l d"]:
        """Hidden states (float32) of prompts, padded to `length`; padding is not masked, as in
        diffusers.

        A prompt that is too long is cut, and that is logged.
        """
        model: Any = self.model
        ids = _tokens(self, prompts, length).to(model.device)
        return model(ids).last_hidden_state.float()


def _tokens(encoder: Clip | T5, prompts: list[str], length: int) -> Tensor:
    for prompt in prompts:
        if (count := encoder.count(prompt)) > length:
            log.warning(
                "prompt of %d tokens cut to %d for %s: %.60s...",
                *(count, length, encoder.title, prompt),
            )
    tokens = encoder.tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return tokens.input_ids


def check_vocabulary(tokenizer: Any, config: Any, title: str) -> None:
    """Refuse a tokenizer that knows more tokens than a text encoder."""
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer of {title} knows {len(tokenizer)} tokens and the text encoder "
            f"{config.vocab_size}: they belong to different models"
        )
