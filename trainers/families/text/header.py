"""Recognise the text encoders in a file by the names and shapes of its tensors. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..errors import ModelError
from ..header import Header

Kind = Literal["clip_l", "clip_g", "t5", "qwen3_4b"]

TITLES: dict[Kind, str] = {
    "clip_l": "CLIP-L",
    "clip_g": "CLIP-G",
    "t5": "T5",
    "qwen3_4b": "Qwen3-4B",
}
SIZES: dict[Kind, int] = {
    "clip_l": 123_060_480,
    "clip_g": 694_659_840,
    "t5": 4_762_310_656,
    "qwen3_4b": 4_022_468_096,
}
"""Weights of the published encoders."""
LAYERS: dict[Kind, tuple[int, int]] = {
    "t5": (131_602_432, 192_946_176),
    "qwen3_4b": (388_956_160, 100_930_816),
}
"""Of the large ones: weights outside of their equal layers, and of such a layer."""


class Tokenizer(NamedTuple):
    """A tokenizer that is not shipped.

    Attributes:
        field: of `Files` and of the config's section `model`.
        title: of the text encoder.
        names: of files; a folder with it holds one of these.
        in_comfyui: its folder in comfy/text_encoders.
    """

    field: str
    title: str
    names: tuple[str, ...]
    in_comfyui: str


TOKENIZERS: dict[Kind, Tokenizer] = {
    "t5": Tokenizer("t5_tokenizer", "T5", ("tokenizer.json", "spiece.model"), "t5_tokenizer"),
    "qwen3_4b": Tokenizer(
        "qwen_tokenizer", "Qwen3", ("tokenizer.json", "vocab.json"), "qwen25_tokenizer"
    ),
}


# What every such encoder has; the group is the prefix its tensors share in the file.
_CLIP = re.compile(r"(|.*\.)embeddings\.token_embedding\.weight")
_OPEN_CLIP = re.compile(r"(|.*\.)(?<!embeddings\.)token_embedding\.weight")
_T5 = re.compile(r"(|.*\.)encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight")

_QWEN = re.compile(r"(|.*\.)layers\.0\.post_attention_layernorm\.weight")
_QWENS = {1024: "Qwen3-0.6B", 2048: "Qwen3-1.7B", 4096: "Qwen3-8B", 5120: "Qwen3-14B or -32B"}
"""Relatives of Qwen3-4B by their width."""

_CLIP_H_WIDTH = 1024
_CLIP_G_WIDTH = 1280


def find_encoders(header: Header) -> dict[Kind, str]:
    """By kind, the prefix of each text encoder in a file.

    A prefix that names an encoder ("clip_g") decides its kind, else its width does.

    Raises:
        ModelError: for a relative of these encoders that no model here was made with.
    """
    prefixes: dict[Kind, str] = {}
    for key, shape in header.shapes.items():
        if match := _T5.fullmatch(key):
            _judge_t5(header, match[1])
            prefixes["t5"] = match[1]
        elif match := _QWEN.fullmatch(key):
            _judge_qwen(header, match[1], shape[0])
            prefixes["qwen3_4b"] = match[1]
        elif match := _CLIP.fullmatch(key) or _OPEN_CLIP.fullmatch(key):
            prefix = match[1].removesuffix("text_model.")
            if shape[-1] == _CLIP_H_WIDTH:
                raise ModelError(
                    f"{header.name} holds a CLIP-H text encoder, which SD2.x was made with: choose "
                    "CLIP-L, CLIP-G or T5-XXL"
                )
            prefixes[_clip_kind(prefix, shape[-1])] = prefix
    return prefixes


def _clip_kind(prefix: str, width: int) -> Kind:
    if "clip_l" in prefix or "embedders.0.transformer" in prefix:
        return "clip_l"
    is_named = "clip_g" in prefix or "embedders.1." in prefix
    return "clip_g" if is_named or width >= _CLIP_G_WIDTH else "clip_l"


def _judge_t5(header: Header, prefix: str) -> None:
    block = f"{prefix}encoder.block."
    if f"{block}1.layer.0.SelfAttention.relative_attention_bias.weight" in header.shapes:
        raise ModelError(f"{header.name} holds a UMT5 text encoder: choose T5-XXL (t5xxl)")
    if f"{block}0.layer.1.DenseReluDense.wi_1.weight" not in header.shapes:
        raise ModelError(f"{header.name} holds a T5 of version 1.0: choose T5-XXL 1.1 (t5xxl)")


def _judge_qwen(header: Header, prefix: str, width: int) -> None:
    relative = _QWENS.get(width, "")
    if any(".visual." in f".{key}" for key in header.shapes):
        relative = "Qwen-VL"
    elif f"{prefix}layers.0.self_attn.q_norm.weight" not in header.shapes:
        is_qwen = f"{prefix}layers.0.self_attn.q_proj.bias" in header.shapes
        relative = "Qwen2.5" if is_qwen else "a language model that is no Qwen3"
    if relative:
        raise ModelError(
            f"{header.name} holds {relative}: Z-Image and FLUX.2 [klein] 4B take Qwen3-4B "
            "(qwen_3_4b.safetensors)"
        )


def width_of(header: Header, kind: Kind, prefix: str) -> int:
    """The length of one token's vector, of the encoder at a prefix from `find_encoders`."""
    ends = {"t5": "SelfAttention.q.weight", "qwen3_4b": "embed_tokens.weight"}
    end = ends.get(kind, "token_embedding.weight")
    own = header.under(prefix)
    return next(shape[-1] for key, shape in own.items() if key.endswith(end))


def encoders_of_file(header: Header) -> dict[Kind, str]:
    """As `find_encoders`, for a file given as a text encoder; `ModelError` if it holds none."""
    prefixes = find_encoders(header)
    if not prefixes:
        first = next(iter(header.shapes), "nothing")
        raise ModelError(
            f"{header.name} holds no CLIP, T5 or Qwen3 text encoder (it begins with {first}): "
            "choose files such as clip_l, clip_g, t5xxl or qwen_3_4b"
        )
    return prefixes


def judge_qwen_parts(
    network: Header,
    text_encoders: Sequence[Header],
    attended: int,
    states: int = 1,
) -> None:
    """Refuse a network without Qwen3-4B, or with another model's text encoder.

    Args:
        network: of the network, or of a whole checkpoint.
        text_encoders: given ones, which replace the checkpoint's own.
        attended: width of the tokens that the network attends to.
        states: hidden states that stand side by side in a token.
    """
    width = None
    for header, encoders in (
        (network, find_encoders(network)),
        *((header, encoders_of_file(header)) for header in text_encoders),
    ):
        if "qwen3_4b" in encoders:
            width = width_of(header, "qwen3_4b", encoders["qwen3_4b"])
    if width is None:
        raise ModelError(
            f"{network.name} comes without its text encoder: give Qwen3-4B (qwen_3_4b.safetensors)"
        )
    if attended != width * states:
        raise ModelError(
            f"the network attends to prompt tokens {attended} wide and this text encoder gives "
            f"{width * states}: they belong to different models; choose Qwen3-4B "
            "(qwen_3_4b.safetensors)"
        )
