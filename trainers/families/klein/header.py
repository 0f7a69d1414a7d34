"""Recognise FLUX.2 [klein] 4B by the names and shapes in files. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..header import Header, judge_vae, prefix_before
from ..precision import judge_precision
from ..text.header import judge_qwen_parts

VAE_CHANNELS = 32
CHANNELS = 4 * VAE_CHANNELS  # in squares of 2 x 2
HEAD = 128  # width of an attention head
CLASS = "Flux2Transformer2DModel"
STATES = 3  # of Qwen3, side by side

VAE_FILE = "flux2-vae.safetensors"
ITS_VAE = f"give FLUX.2's ({VAE_FILE}) or TAEF2"
REMEDY = "choose FLUX.2 [klein] base 4B or a model made from it"

# The original names and diffusers' of the tensors that tell what the network is.
_MARKS = tuple(f"double_stream_modulation_img.{end}.weight" for end in ("lin", "linear"))
_ENTRIES = ("img_in.weight", "x_embedder.weight")
_CONTEXT = ("txt_in.weight", "context_embedder.weight")
_GUIDANCE = (
    "guidance_in.in_layer.weight",
    "time_guidance_embed.guidance_embedder.linear_1.weight",
)
_WIDTHS_OF_9B = (4096, 12288)  # of the network and of the tokens that it attends to

_DEV = f"is FLUX.2 [dev], of 32 billion weights and a non-commercial licence: {REMEDY}"
_9B = f"is FLUX.2 [klein] 9B, whose licence is non-commercial: {REMEDY}"


def network_prefix(header: Header) -> str | None:
    """The prefix of a file's FLUX.2 network; None if it holds none."""
    return prefix_before(header, _MARKS)


def is_klein(header: Header) -> bool:
    """Whether a file holds a network of FLUX.2's kind, usable or not."""
    return network_prefix(header) is not None


def judge_klein(header: Header) -> None:
    """Refuse anything but a network of FLUX.2 [klein] 4B's kind.

    The header is of a whole checkpoint, or of the network alone; the error says what the file is
    and what to do.
    """
    name, shapes = header.name, header.under(network_prefix(header) or "")
    if _first(shapes, _GUIDANCE) is not None:
        raise ModelError(f"{name} {_DEV}")
    entry, context = _first(shapes, _ENTRIES), _first(shapes, _CONTEXT)
    if entry and context and (entry[0], context[1]) == _WIDTHS_OF_9B:
        raise ModelError(f"{name} {_9B}")
    judge_precision(header)
    if entry is None or context is None or entry[0] % HEAD:
        raise ModelError(f"{name} holds no complete network of FLUX.2 [klein] 4B: {REMEDY}")
    _judge_channels(entry[1], name)


def judge_klein_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse anything but FLUX.2 [klein] 4B's kind, by a folder's transformer/config.json."""
    if config.get("guidance_embeds", True):
        raise ModelError(f"the network in {name} {_DEV}")
    width = config.get("num_attention_heads", 48) * config.get("attention_head_dim", HEAD)
    if (width, config.get("joint_attention_dim")) == _WIDTHS_OF_9B:
        raise ModelError(f"the network in {name} {_9B}")
    _judge_channels(config.get("in_channels", CHANNELS), f"the network in {name}")


def judge_klein_in_comfyui(config: Mapping[str, Any]) -> None:
    """Refuse relatives that ComfyUI has the same class for, by its `unet_config`."""
    if config.get("guidance_embed"):
        raise ModelError(f"this MODEL {_DEV}")
    if (config.get("hidden_size"), config.get("context_in_dim")) == _WIDTHS_OF_9B:
        raise ModelError(f"this MODEL {_9B}")


def _judge_channels(channels: int, what: str) -> None:
    if channels != CHANNELS:
        raise ModelError(
            f"{what} takes {channels} channels a token where FLUX.2 [klein] takes {CHANNELS}: it "
            f"is another model; {REMEDY}"
        )


def _first(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> tuple[int, ...] | None:
    return next((shapes[name] for name in names if name in shapes), None)


def judge_klein_parts(
    network: Header, text_encoders: Sequence[Header] = (), vae: Header | None = None
) -> None:
    """Refuse a network without Qwen3-4B or an autoencoder, or with another model's.

    Given text encoders and VAE replace the checkpoint's own.
    """
    context = _first(network.under(network_prefix(network) or ""), _CONTEXT) or (0, 0)
    judge_qwen_parts(network, text_encoders, context[1], STATES)
    judge_vae(vae or network, VAE_CHANNELS, ITS_VAE)


def is_distilled(path: Path) -> bool:
    """Whether a folder's notes, or a file's or folder's name, say that it is the distilled model.

    >>> is_distilled(Path("flux-2-klein-4b.safetensors"))
    True
    >>> is_distilled(Path("flux-2-klein-base-4b.safetensors")), is_distilled(Path("my_model.sft"))
    (False, False)
    """
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        return bool(index["is_distilled"])
    except (OSError, ValueError, KeyError, TypeError):
        return "klein" in path.name.lower() and "base" not in path.name.lower()
