"""Recognise Z-Image by the names and shapes in files. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..header import NETWORK_PREFIXES, Header, judge_vae
from ..precision import judge_precision
from ..text.header import judge_qwen_parts

CHANNELS = 16
PATCH = 2  # points of the latent along the side of a token
HEAD = 128  # width of an attention head
CLASS = "ZImageTransformer2DModel"
VAE_FILE = "ae.safetensors"

REMEDY = "choose Z-Image or a model made from it"

_MARKS = ("cap_embedder.1.weight", "control_layers.0.attention.qkv.weight")
_CONTROL = ("control_layers.", "control_all_x_embedder.", "control_noise_refiner.")
_ENTRIES = ("x_embedder.weight", "all_x_embedder.2-1.weight")

# Relatives of Z-Image, by the beginnings of names that only they have.
_RELATIVES = (
    (_CONTROL, "a Z-Image ControlNet"),
    (("siglip_embedder.", "siglip_refiner."), "Z-Image-Omni or -Edit, which also takes images,"),
    (("dec_net.", "__x0__"), "a Z-Image that draws pixels, without an autoencoder,"),
    (("clip_text_pooled_proj.",), "NewBie"),
)
_DE_TURBO = re.compile(r"de[-_. ]?turbo", re.IGNORECASE)


def network_prefix(header: Header) -> str | None:
    """The prefix of a file's Z-Image network; None if it holds none."""
    for prefix in NETWORK_PREFIXES:
        if any(prefix + mark in header.shapes for mark in _MARKS):
            return prefix
        if any(key.startswith(tuple(prefix + part for part in _CONTROL)) for key in header.shapes):
            return prefix
    return None


def is_zimage(header: Header) -> bool:
    """Whether a file holds a network of Z-Image's kind, usable or not."""
    return network_prefix(header) is not None


def judge_zimage(header: Header) -> None:
    """Refuse anything but a text-to-image network of Z-Image.

    The header is of a whole checkpoint, or of the network alone; the error says what the file is
    and what to do.
    """
    name, shapes = header.name, header.under(network_prefix(header) or "")
    for starts, relative in _RELATIVES:
        if any(key.startswith(starts) for key in shapes):
            raise ModelError(f"{name} is {relative} and is not supported: {REMEDY}")
    if "cap_pad_token" not in shapes:
        raise ModelError(f"{name} is Lumina-Image 2.0 and is not supported: {REMEDY}")
    judge_precision(header)
    entry = next((shapes[key] for key in _ENTRIES if key in shapes), None)
    if entry is None or entry[0] % HEAD:
        raise ModelError(f"{name} holds no complete network of Z-Image: {REMEDY}")
    _judge_channels(entry[1] // PATCH**2, name)


def judge_zimage_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse anything but a text-to-image network, by a folder's transformer/config.json."""
    if config.get("siglip_feat_dim") is not None:
        raise ModelError(f"the network in {name} is {_RELATIVES[1][1]} and is not supported")
    _judge_channels(config.get("in_channels", CHANNELS), f"the network in {name}")


def _judge_channels(channels: int, what: str) -> None:
    if channels != CHANNELS:
        raise ModelError(
            f"{what} takes {channels} channels where Z-Image takes {CHANNELS}: it is an edit model "
            f"or draws pixels, which cannot be trained here; {REMEDY}"
        )


def judge_zimage_parts(
    network: Header, text_encoders: Sequence[Header] = (), vae: Header | None = None
) -> None:
    """Refuse a network without Qwen3-4B or an autoencoder, or with another model's text encoder.

    Given text encoders and VAE replace the checkpoint's own.
    """
    shapes = network.under(network_prefix(network) or "")
    width = shapes.get("cap_embedder.1.weight", (0, 0))[1]
    judge_qwen_parts(network, text_encoders, width)
    judge_vae(vae or network, CHANNELS, f"give Z-Image's (FLUX.1's: {VAE_FILE})")


def is_turbo(path: Path) -> bool:
    """Whether a file's or folder's name says that it is Z-Image-Turbo.

    >>> [is_turbo(Path(n)) for n in ("z_image_turbo_bf16.sft", "Z-Image", "z_image_de_turbo.sft")]
    [True, False, False]
    """
    return "turbo" in path.name.lower() and not _DE_TURBO.search(path.name)
