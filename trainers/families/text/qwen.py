"""Qwen3-4B, the text encoder of Z-Image and FLUX.2 [klein] 4B, read in two ways.

Both models take hidden states of inner layers, so that the last ones are never read. Prompts stand
in constant templates: the chat template beside a tokenizer may add a system prompt.

Shapes: l tokens; d the width of what the network attends to.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from ..assemble import assemble
from ..errors import ModelError
from ..weights import Weights
from .encoders import check_vocabulary
from .files import part_tensors
from .header import TITLES, Kind
from .tokenizers import qwen_tokenizer

log = logging.getLogger(__name__)

LENGTH = 512
"""Tokens of a prompt with its template, at most."""

_TITLE = TITLES["qwen3_4b"]
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\..+")
_THETA, _EPS = 1e6, 1e-6


@dataclass(frozen=True, slots=True)
class Reading:
    """How a family reads Qwen3.

    Attributes:
        template: around the prompt, with one {}.
        layers: hidden states that stand side by side, counted as transformers does: 0 is before the
            first layer, -1 after the last one.
        is_padded: padding up to `LENGTH` is encoded, and the network attends to it.
    """

    template: str
    layers: tuple[int, ...]
    is_padded: bool

    def places(self, depth: int) -> tuple[int, ...]:
        """The hidden states of an encoder of so many layers, counted from 0."""
        return tuple(layer % (depth + 1) for layer in self.layers)


@dataclass(eq=False)
class Qwen3:
    """Qwen3 up to the last layer that is read, with its tokenizer.

    Attributes:
        model: without a final norm.
        tokenizer: pads on the right.
        reading: the family's.
        places: of the hidden states that are read.
    """

    model: Qwen3Model
    tokenizer: Any
    reading: Reading
    places: tuple[int, ...]
    title: str = _TITLE

    def __post_init__(self) -> None:
        check_vocabulary(self.tokenizer, self.model.config, self.title)

    @property
    def width(self) -> int:
        """Length of one token's vector for the network."""
        return self.model.config.hidden_size * len(self.places)

    def _ids(self, prompt: str) -> list[int]:
        return self.tokenizer(self.reading.template.format(prompt)).input_ids

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, including its template."""
        return len(self._ids(prompt))

    @torch.no_grad()
    def encode(self, prompt: str) -> Float[Tensor, "l d"]:
        """Hidden states of a prompt, float32: of its tokens, or of `LENGTH`.

        A prompt that is too long is cut, and that is logged. Prompts are encoded one by one, so
        that none depends on others.
        """
        ids = self._ids(prompt)
        if len(ids) > LENGTH:
            log.warning(
                "prompt of %d tokens cut to %d for %s: %.60s...",
                *(len(ids), LENGTH, self.title, prompt),
            )
        ids = ids[:LENGTH]
        missing = LENGTH - len(ids) if self.reading.is_padded else 0
        model: Any = self.model
        row = torch.tensor([[*ids, *[self.tokenizer.pad_token_id] * missing]], device=model.device)
        mask = (torch.arange(row.shape[1], device=model.device) < len(ids))[None].long()
        states = model(
            row, attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        return torch.cat([states[place] for place in self.places], dim=-1)[0].float()


def is_read(reading: Reading, depth: int) -> Callable[[str], bool]:
    """Whether a reading needs a tensor of an encoder of so many layers, by its name."""
    last = max(reading.places(depth))

    def is_wanted(key: str) -> bool:
        match = _LAYER.fullmatch(key)
        return int(match[1]) < last if match else "embed_tokens." in key

    return is_wanted


def depth_of(names: Iterable[str]) -> int:
    """The number of an encoder's layers, by the names of its tensors."""
    return max((int(m[1]) for key in names if (m := _LAYER.fullmatch(key))), default=-1) + 1


def qwen_from_files(
    places: Mapping[Kind, tuple[Weights, str]],
    reading: Reading,
    tokenizer: Path | None,
    dtype: torch.dtype,
) -> Qwen3:
    """Qwen3 from the file that holds it, on the CPU.

    `tokenizer` is a folder, or None to search for one.
    """
    weights, prefix = places["qwen3_4b"]
    found = qwen_tokenizer(tokenizer)  # before gigabytes are read
    what = f"{_TITLE} in {weights.header.name}"
    own = weights.select(lambda key: key.startswith(prefix))
    depth = depth_of(own.header.shapes)
    tensors = own.select(is_read(reading, depth)).under(prefix, dtype)
    return load_qwen(tensors, found, reading, depth, what)


def qwen_from_folder(path: Path, reading: Reading, dtype: torch.dtype) -> Qwen3:
    """Qwen3 of a diffusers folder, on the CPU."""
    part, found = path / "text_encoder", qwen_tokenizer(path / "tokenizer")
    depth = depth_of(part_tensors(part, is_outline=True))
    tensors = part_tensors(part, dtype, wanted=is_read(reading, depth))
    named = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
    return load_qwen(named, found, reading, depth, f"the text encoder in {part}")


def load_qwen(
    tensors: Mapping[str, Tensor], tokenizer: Any, reading: Reading, depth: int, what: str
) -> Qwen3:
    """The frozen encoder from the tensors that are read.

    Args:
        tensors: named without a prefix, and not copied.
        tokenizer: Qwen3's.
        reading: the family's.
        depth: layers of the whole encoder.
        what: for messages ("Qwen3-4B in qwen_3_4b.safetensors").

    Raises:
        ModelError: if a tensor is missing or does not belong to it.
    """
    if any(layer > depth for layer in reading.layers):
        raise ModelError(
            f"{what} has {depth} layers, and layer {max(reading.layers)} is read: choose {_TITLE}"
        )
    places = reading.places(depth)
    config = _config({key: tuple(t.shape) for key, t in tensors.items()}, max(places), what)

    def make() -> Qwen3Model:
        model = Qwen3Model(config)
        model.add_module("norm", nn.Identity())
        return model

    model: Any = assemble(make, tensors, what)
    model.rotary_emb = Qwen3RotaryEmbedding(config=config)  # was on meta
    return Qwen3(model, tokenizer, reading, places)


def _config(shapes: Mapping[str, tuple[int, ...]], layers: int, what: str) -> Qwen3Config:
    first = "layers.0."
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        head = shapes[f"{first}self_attn.q_norm.weight"][0]
        rows = {name: shapes[f"{first}self_attn.{name}_proj.weight"][0] for name in "qk"}
        inner = shapes[f"{first}mlp.gate_proj.weight"][0]
    except KeyError as error:
        raise ModelError(f"{what} lacks {error}: the file is incomplete or no Qwen3") from error
    kind: Any = Qwen3Config  # its fields are not all in its signature
    return kind(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=rows["q"] // head,
        num_key_value_heads=rows["k"] // head,
        head_dim=head,
        rms_norm_eps=_EPS,
        rope_theta=_THETA,
        max_position_embeddings=40960,
    )
