"""Recognise SDXL by the names and shapes in a file, or by a folder's config. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError
from ..header import Header, judge_vae, prefix_before
from ..precision import judge_precision
from ..text.header import Kind, encoders_of_file, find_encoders, width_of

CLASS = "UNet2DConditionModel"
CHANNELS = 4
SIZES = 6 * 256  # of the vector beside the pooled one: embeddings of six sizes

REMEDY = "SDXL takes CLIP-L (clip_l) and CLIP-G (clip_g)"

_MARKS = ("label_emb.0.0.weight", "add_embedding.linear_1.weight")
_ENTRIES = ("input_blocks.0.0.weight", "conv_in.weight")
_REFINER, _KOLORS = 1280 + 5 * 256, 5632  # widths of the vector beside the timestep
_EDM = {"edm_mean": "Playground v2.5", "edm_vpred.sigma_max": "CosXL"}
# Distilled relatives by the depths of their transformers, level by level.
_PRUNED: dict[tuple[int, ...], str] = {
    (0, 2, 4): "SSD-1B",
    (0, 1, 2): "Segmind Vega",
    (0, 2, 5): "KOALA-1B",
    (0, 2, 6): "KOALA-700M",
}
_FAST = re.compile(r"(?i)turbo|lightning|hyper|(?<![a-z])(?:lcm|dmd2?|pcm)(?![a-z])")


def network_prefix(header: Header) -> str | None:
    """The prefix of a file's network; None if it holds none."""
    return prefix_before(header, _MARKS)


def is_sdxl(header: Header) -> bool:
    """Whether a file holds a network of SDXL's kind, usable or not."""
    return network_prefix(header) is not None


def judge_sdxl(header: Header) -> None:
    """Refuse anything but SDXL's text-to-image network, saying what the file is and what to do.

    The header is of a whole checkpoint, or of the network alone.
    """
    name, shapes = header.name, header.under(network_prefix(header) or "")
    for mark, relative in _EDM.items():
        if mark in header.shapes:
            raise ModelError(
                f"{name} is {relative}, whose noise schedule (EDM) is not SDXL's, and which cannot "
                "be trained here. Choose SDXL or a model made from it"
            )
    conditions = next(shapes[mark][1] for mark in _MARKS if mark in shapes)
    for width, relative in ((_REFINER, "the SDXL refiner"), (_KOLORS, "Kolors")):
        if conditions == width:
            raise ModelError(
                f"{name} is {relative}, which cannot be trained here. Choose the SDXL base model, "
                "or one made from it"
            )
    judge_precision(header)
    entry = next((shapes[entry] for entry in _ENTRIES if entry in shapes), None)
    if entry is None:
        raise ModelError(f"{name} holds no complete network of SDXL: download it again")
    _judge_channels(entry[1], name)
    middle = ("middle_block.1.transformer_blocks.0.", "mid_block.attentions.0.")
    if not any(key.startswith(middle) for key in shapes):
        relative = _PRUNED.get(_depths(shapes), "a smaller network made from SDXL")
        raise ModelError(
            f"{name} is {relative}, which has fewer layers than SDXL and cannot be trained here. "
            "Choose SDXL or a model made from it"
        )


def _depths(shapes: Mapping[str, Any]) -> tuple[int, ...]:
    """The deepest transformer of each level, from the original names or diffusers'."""
    pattern = re.compile(
        r"(?:input_blocks\.(\d+)\.1|down_blocks\.(\d+)\.attentions\.\d+)\.transformer_blocks\.(\d+)\."
    )
    downs = [int(m[1]) for key in shapes if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.", key))]
    depths = [0, 0, 0]
    for key in shapes:
        if match := pattern.match(key):
            level = int(match[2] or sum(int(match[1] or 0) > down for down in downs))
            if level < len(depths):
                depths[level] = max(depths[level], int(match[3]) + 1)
    return tuple(depths)


def is_sdxl_config(config: Mapping[str, Any]) -> bool:
    """Whether a folder's unet/config.json is of SDXL."""
    return config.get("addition_embed_type") == "text_time"


def judge_sdxl_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse anything but a text-to-image network of SDXL's own size."""
    conditions = config.get("projection_class_embeddings_input_dim")
    for width, relative in ((_REFINER, "the SDXL refiner"), (_KOLORS, "Kolors")):
        if conditions == width:
            raise ModelError(
                f"the network in {name} is {relative}, which cannot be trained here. Choose the "
                "SDXL base model, or one made from it"
            )
    _judge_channels(config.get("in_channels", CHANNELS), f"the network in {name}")
    if config.get("mid_block_type", "") is None:
        raise ModelError(
            f"the network in {name} has fewer layers than SDXL (SSD-1B, Vega, KOALA) and cannot be "
            "trained here. Choose SDXL or a model made from it"
        )


def _judge_channels(channels: int, what: str) -> None:
    if channels != CHANNELS:
        kind = "an inpainting" if channels == 9 else "an edit"
        raise ModelError(
            f"{what} takes {channels} channels where SDXL takes {CHANNELS}: it is {kind} model, "
            "which cannot be trained here. Choose its text-to-image version"
        )


def judge_sdxl_parts(
    network: Header, text_encoders: Sequence[Header] = (), vae: Header | None = None
) -> None:
    """Refuse a network without both CLIPs or an autoencoder, or with another model's.

    Given text encoders and VAE replace the checkpoint's own.
    """
    widths: dict[Kind, int] = {}
    for header, encoders in (
        (network, find_encoders(network)),
        *((header, encoders_of_file(header)) for header in text_encoders),
    ):
        if "t5" in encoders:
            raise ModelError(f"{header.name} holds T5: {REMEDY}")
        widths |= {kind: width_of(header, kind, prefix) for kind, prefix in encoders.items()}
    for kind, title in (("clip_l", "CLIP-L"), ("clip_g", "CLIP-G")):
        if kind not in widths:
            raise ModelError(f"{network.name} comes without {title}: {REMEDY}, give both")
    shapes = network.under(network_prefix(network) or "")
    context = next(
        (shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None
    )
    if context is not None and context != sum(widths.values()):
        raise ModelError(
            f"the network attends to prompt tokens {context} wide and the CLIPs give "
            f"{sum(widths.values())}: they belong to different models; {REMEDY}"
        )
    judge_vae(
        vae or network,
        CHANNELS,
        "choose a whole checkpoint, or give the VAE's file beside it (sdxl_vae)",
    )


def distilled(name: str, metadata: Mapping[str, str]) -> str | None:
    """The word in a file's name or notes that tells of a few-step distillation, if there is one.

    >>> distilled("dreamshaperXL_lightningDPMSDE.safetensors", {}), distilled("pony.ckpt", {})
    ('lightning', None)
    """
    notes = ("modelspec.title", "ss_output_name", "ss_sd_model_name", "modelspec.description")
    for text in (name, *(metadata.get(note, "") for note in notes)):
        if match := _FAST.search(text):
            return match[0].lower()
    return None
