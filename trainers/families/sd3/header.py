"""Recognise SD3 and SD3.5 by the names and shapes in files. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..header import NETWORK_PREFIXES, Header, judge_vae
from ..precision import judge_precision
from ..text.header import encoders_of_file, find_encoders, width_of

CHANNELS = 16
CLASS = "SD3Transformer2DModel"

# The original names and diffusers' of the tensors that tell what the network is.
_ENTRIES = ("x_embedder.proj.weight", "pos_embed.proj.weight")
_MARKS = (
    "joint_blocks.0.context_block.attn.qkv.weight",
    "transformer_blocks.0.attn.add_q_proj.weight",
)

# Relatives of SD3 with another architecture, by a part of a name that only they have.
_RELATIVES = {
    "controlnet_": "an SD3 ControlNet",
    "context_processor.": "an SD3 model with layers of its own for the text (context_processor)",
    "image_proj.": "an SD3 IP-Adapter",
}


def network_prefix(header: Header) -> str | None:
    """The prefix of a file's SD3 network; None if it holds none."""
    for prefix in NETWORK_PREFIXES:
        for mark, entry in zip(_MARKS, _ENTRIES, strict=True):
            if prefix + mark in header.shapes and prefix + entry in header.shapes:
                return prefix
    return None


def is_sd3(header: Header) -> bool:
    """Whether a file holds a network of SD3's kind, usable or not."""
    return any("joint_blocks.0.x_block." in key for key in header.shapes) or (
        network_prefix(header) is not None
    )


def judge_sd3(header: Header) -> None:
    """Refuse anything but a text-to-image network of SD3 or SD3.5.

    The header is of a whole checkpoint, or of the network alone; the error says what the file is
    and what to do.
    """
    prefix, name = network_prefix(header), header.name
    for mark, relative in _RELATIVES.items():
        if any(mark in key for key in header.shapes):
            raise ModelError(f"{name} is {relative}, which is not supported: choose SD3.5 or SD3")
    judge_precision(header)
    if prefix is None:
        raise ModelError(
            f"{name} has blocks as SD3's, but is no complete SD3 network: download it again, or "
            "choose another"
        )
    entry = next(header.shapes[prefix + e] for e in _ENTRIES if prefix + e in header.shapes)
    _judge_channels(entry[1], name)


def judge_sd3_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse anything but a text-to-image network, by a folder's transformer/config.json."""
    _judge_channels(config.get("in_channels", CHANNELS), f"the network in {name}")


def _judge_channels(channels: int, what: str) -> None:
    if channels != CHANNELS:
        raise ModelError(
            f"{what} takes {channels} channels where SD3 takes {CHANNELS}: it is an inpainting or "
            "edit model, which cannot be trained here. Choose its text-to-image version"
        )


def judge_sd3_parts(
    network: Header, text_encoders: Sequence[Header] = (), vae: Header | None = None
) -> None:
    """Refuse a network without any text encoder or an autoencoder, or with another model's T5.

    Given text encoders and VAE replace the checkpoint's own.
    """
    encoders_by_file = [(network, find_encoders(network))]
    encoders_by_file += [(header, encoders_of_file(header)) for header in text_encoders]
    if not any(encoders for _, encoders in encoders_by_file):
        raise ModelError(
            f"{network.name} holds no text encoder: choose a whole checkpoint, or give the files "
            "of CLIP-L, CLIP-G and T5-XXL (clip_l, clip_g, t5xxl) beside it"
        )
    judge_vae(
        vae or network, CHANNELS, "choose a whole checkpoint, or give the VAE's file beside it"
    )
    shapes = network.under(network_prefix(network) or "")
    context = shapes.get("context_embedder.weight")
    t5 = [
        width_of(header, "t5", kinds["t5"]) for header, kinds in encoders_by_file if "t5" in kinds
    ]
    if context is not None and t5 and context[1] != t5[-1]:
        raise ModelError(
            f"the network attends to prompt tokens {context[1]} wide and T5 gives {t5[-1]}: they "
            "belong to different models; SD3 takes CLIP-L, CLIP-G and T5-XXL"
        )
