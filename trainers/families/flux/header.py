"""Recognise FLUX.1 by the names and shapes in a file. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..header import Header, judge_vae, prefix_before
from ..precision import judge_precision
from ..text.header import TITLES, Kind, encoders_of_file, find_encoders, width_of

VAE_CHANNELS = 16
CHANNELS = 4 * VAE_CHANNELS  # in squares of 2 x 2
VAE_FILE = "ae.safetensors"
HEAD = 128  # width of an attention head
CLASS = "FluxTransformer2DModel"

REMEDY = "FLUX takes CLIP-L (clip_l) and T5-XXL (t5xxl)"

# The original names and diffusers' of the tensors that tell what the network is.
_MARKS = ("double_blocks.0.img_attn.proj.weight", "single_transformer_blocks.0.proj_mlp.weight")
_ENTRIES = ("img_in.weight", "x_embedder.weight")
_POOLED = ("vector_in.in_layer.weight", "time_text_embed.text_embedder.linear_1.weight")
_CONTEXT = ("txt_in.weight", "context_embedder.weight")
_GUIDANCE = ("guidance_in.in_layer.weight", "time_text_embed.guidance_embedder.linear_1.weight")

# Relatives of FLUX.1 with another architecture, by a part of a name that only they have.
_RELATIVES = {
    "distilled_guidance_layer.": "Chroma",
    "double_stream_modulation_img.": "FLUX.2",
    "individual_token_refiner.": "HunyuanVideo",
}
_SCHNELL = (
    "takes no guidance, as FLUX.1-schnell: schnell is timestep-distilled, it maps noise to an "
    "image in a few steps and has no velocity at every sigma that its policy could be trained on. "
    "Choose FLUX.1-dev or a model made from it"
)


def network_prefix(header: Header) -> str | None:
    """The prefix of a file's FLUX network; None if it holds none."""
    return prefix_before(header, _MARKS)


def is_flux(header: Header) -> bool:
    """Whether a file holds a network of FLUX's kind, usable or not."""
    return network_prefix(header) is not None


def judge_flux(header: Header) -> None:
    """Refuse anything but FLUX.1-dev's network, saying what the file is and what to do.

    The header is of a whole checkpoint, or of the network alone.
    """
    name, shapes = header.name, header.under(network_prefix(header) or "")
    for mark, relative in _RELATIVES.items():
        if any(mark in key for key in shapes):
            raise ModelError(
                f"{name} is a {relative} model, which is not supported: use FLUX.1-dev"
            )
    judge_precision(header)
    entry, pooled = _first(shapes, _ENTRIES), _first(shapes, _POOLED)
    if entry is None or pooled is None or entry[0] % HEAD:
        raise ModelError(
            f"{name} holds no complete network of FLUX.1: choose FLUX.1-dev or a model made from it"
        )
    if entry[1] != CHANNELS:
        raise ModelError(
            f"{name} takes {entry[1]} channels a token where FLUX.1-dev takes {CHANNELS}: it is an "
            "inpainting or edit model (Fill, Canny, Depth), which cannot be trained here"
        )
    if _first(shapes, _GUIDANCE) is None:
        raise ModelError(f"{name} {_SCHNELL}")


def _first(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> tuple[int, ...] | None:
    return next((shapes[name] for name in names if name in shapes), None)


def judge_flux_parts(
    network: Header, text_encoders: Sequence[Header] = (), vae: Header | None = None
) -> None:
    """Refuse a network without CLIP-L or an autoencoder, or with another model's text encoders.

    Given text encoders and VAE replace the checkpoint's own.
    """
    widths: dict[Kind, int] = {}
    for header, encoders in (
        (network, find_encoders(network)),
        *((header, encoders_of_file(header)) for header in text_encoders),
    ):
        if "clip_g" in encoders and header is not network:
            raise ModelError(f"{header.name} holds CLIP-G: {REMEDY}")
        widths |= {kind: width_of(header, kind, prefix) for kind, prefix in encoders.items()}
    if "clip_l" not in widths:
        raise ModelError(f"{network.name} comes without CLIP-L: {REMEDY}, give both")
    shapes = network.under(network_prefix(network) or "")
    context, attended = _first(shapes, _CONTEXT), "t5" if "t5" in widths else "clip_l"
    if context is not None and context[1] != widths[attended]:
        raise ModelError(
            f"the network attends to prompt tokens {context[1]} wide and {TITLES[attended]} gives "
            f"{widths[attended]}: they belong to different models; {REMEDY}"
        )
    judge_vae(vae or network, VAE_CHANNELS, f"give FLUX's ({VAE_FILE})")


def judge_flux_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse anything but FLUX.1-dev, by a diffusers folder's transformer/config.json."""
    channels = config.get("in_channels", CHANNELS)
    if channels != CHANNELS or config.get("out_channels") not in (None, CHANNELS):
        raise ModelError(
            f"the network in {name} takes {channels} channels a token where FLUX.1-dev takes "
            f"{CHANNELS}: it is an inpainting or edit model, which cannot be trained here"
        )
    if not config.get("guidance_embeds", False):
        raise ModelError(f"the network in {name} {_SCHNELL}")
