"""Which loaded SD3.5 and FLUX models can be trained, and what their noise schedule says."""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..demo.nodes import demo_id_of
from ..errors import NodeError
from ..families import FLUX, SD3, TITLES

ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5"}
"""ComfyUI's names of text encoders, and the trainer's."""

CLIPS = {SD3: "SD3ClipModel", FLUX: "FluxClipModel"}
"""How ComfyUI's class of a family's CLIP begins."""

LOADERS = {
    SD3: "connect the CLIP of an SD3.5 checkpoint, or clip_l, clip_g and t5xxl by TripleCLIPLoader",
    FLUX: "connect clip_l and t5xxl by DualCLIPLoader, type flux",
}

CHANNELS = 16
TIMES = {SD3: 1000.0, FLUX: 1.0}
"""What a network is told at sigma 1."""
VAES = ("AutoencodingEngine", "AutoencoderKL", "TAESD")


def judge_flow(family: str, model: Any, clip: Any, vae: Any) -> None:
    """Refuse what cannot be trained as it is loaded."""
    _judge_network(family, model)
    _judge_schedule(family, model)
    _judge_layers(family, clip)
    if demo_id_of(model) is None:  # whose own encoder and VAE are compared number by number
        _judge_clip(family, model, clip)
        _judge_vae(family, vae)


def encoders_of(clip: Any) -> dict[str, Any]:
    """The text encoders of a CLIP, those that are there, by the trainer's names."""
    stage = clip.cond_stage_model
    found = {ours: getattr(stage, theirs, None) for theirs, ours in ENCODERS.items()}
    return {name: encoder for name, encoder in found.items() if encoder is not None}


def width_of(encoder: Any) -> int:
    """Length of the vector that a text encoder gives a token."""
    return encoder.transformer.get_input_embeddings().weight.shape[-1]


def asked_shift(model: Any) -> float | None:
    """The shift that a ModelSampling node has set; None where there is no such node."""
    if "model_sampling" not in model.object_patches:
        return None
    return host.shift_of(host.sampling_of(model))


def _judge_network(family: str, model: Any) -> None:
    config = model.model.model_config.unet_config
    channels = config.get("in_channels", CHANNELS)
    if channels != CHANNELS:
        raise NodeError(
            f"this MODEL takes {channels} channels, as inpainting and edit models do, which cannot "
            "be trained here; load its text-to-image version"
        )
    if config.get("context_processor_layers"):
        raise NodeError(
            f"this MODEL is an {TITLES[family]} with layers of its own for the text "
            "(context_processor), which cannot be trained here; load SD3.5"
        )


def _judge_schedule(family: str, model: Any) -> None:
    sampling = host.sampling_of(model)
    is_flow = host.family_of(sampling) == host.FLOW
    if is_flow and getattr(sampling, "shift", None) is not None:
        told = float(sampling.timestep(torch.tensor(1.0)))
        if abs(told - TIMES[family]) < 1e-3 and host.shift_of(sampling) > 0:
            return
    node = {SD3: "ModelSamplingSD3", FLUX: "ModelSamplingFlux"}[family]
    raise NodeError(
        f"a ModelSampling node gives this MODEL a schedule that is not {TITLES[family]}'s; connect "
        f"the MODEL from before it, or use {node}"
    )


def _judge_layers(family: str, clip: Any) -> None:
    if clip.layer_idx is not None:
        raise NodeError(
            f"CLIP Set Last Layer is at {clip.layer_idx}, and {TITLES[family]} reads fixed layers "
            "of its text encoders; connect the CLIP from before that node"
        )


def _judge_clip(family: str, model: Any, clip: Any) -> None:
    kind, encoders = type(clip.cond_stage_model).__name__, encoders_of(clip)
    widths = {name: width_of(encoder) for name, encoder in encoders.items()}
    wanted = context_width(family, model)
    # a small FLUX may attend to CLIP-L's own tokens
    is_small = family == FLUX and set(encoders) == {"clip_l"} and widths["clip_l"] == wanted
    if not encoders or not (kind.startswith(CLIPS[family]) or is_small):
        raise NodeError(f"this CLIP is {kind}, which no {TITLES[family]} reads; {LOADERS[family]}")
    if widths.get("t5", wanted) != wanted:
        raise NodeError(
            f"this CLIP's T5 gives {widths['t5']} numbers per token and this MODEL reads {wanted}; "
            f"{LOADERS[family]}"
        )


def context_width(family: str, model: Any) -> int:
    """Numbers a token of the prompt that a network attends to."""
    config = model.model.model_config.unet_config
    if family == FLUX:
        return config["context_in_dim"]
    return config["context_embedder_config"]["params"]["in_features"]


def _judge_vae(family: str, vae: Any) -> None:
    kind = type(vae.first_stage_model).__name__
    if kind not in VAES or vae.latent_channels != CHANNELS:
        title = TITLES[family]
        raise NodeError(f"this VAE ({kind}) is not for {title}; connect the VAE of {title}")
