"""Recognise SD1.x by the names and shapes in a file, or by a folder's config. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from ..header import TEXT, UNET, VAE, Header, judge_quantised, known_as

CLASS = "UNet2DConditionModel"
CHANNELS = 4
ENTRY = f"{UNET}input_blocks.0.0.weight"


def is_sd1(header: Header) -> bool:
    """Whether a file holds a network of SD1.x's kind, usable or not."""
    is_other = any("label_emb." in key for key in header.shapes) or known_as(header) is not None
    return ENTRY in header.shapes and not is_other


def judge_sd1(header: Header) -> None:
    """Refuse anything but a whole checkpoint, saying what the file is and what to do."""
    judge_quantised(header)
    _judge_channels(header.shapes[ENTRY][1], header.name)
    for part, prefix in (("text encoder", TEXT), ("VAE", VAE)):
        if not header.under(prefix):
            raise ModelError(
                f"{header.name} holds no {part} (no tensor named {prefix}...): choose a whole "
                "checkpoint, or save one with ComfyUI's Save Checkpoint node"
            )


def is_sd1_config(config: Mapping[str, Any]) -> bool:
    """Whether a folder's unet/config.json is of SD1.x."""
    others = config.get("addition_embed_type"), config.get("cross_attention_dim") == 1024
    return config.get("_class_name", CLASS) == CLASS and others == (None, False)


def judge_sd1_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse anything but a text-to-image network."""
    _judge_channels(config.get("in_channels", CHANNELS), f"the network in {name}")


def _judge_channels(channels: int, what: str) -> None:
    if channels != CHANNELS:
        raise ModelError(
            f"{what} takes {channels} channels: it is an inpainting or edit model, which cannot be "
            "trained here. Choose its text-to-image version"
        )
