"""Which loaded models can be trained, and why others cannot. Judged before any work.

ComfyUI's classes are told by their names, so that nothing of ComfyUI is imported; what a family has
there is in its `FamilySpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...pcpo.schedules import scaled_linear_alpha_bars, zero_terminal_snr
from ...trainers.errors import UserError
from ...trainers.families.registry import FAMILIES
from ...trainers.families.spec import FamilySpec
from ...trainers.families.text.header import TITLES
from .. import host
from ..demo.nodes import demo_id_of
from ..errors import NodeError
from ..families import class_of, family_of_model
from .state import refuse_patches, weights_note

NAMES = {
    "SD20": "SD2.x",
    "SDXLRefiner": "the SDXL refiner",
    "SDXL_instructpix2pix": "SDXL InstructPix2Pix",
    "SSD1B": "SDXL (SSD-1B)",
    "Segmind_Vega": "SDXL (Vega)",
    "KOALA_700M": "SDXL (KOALA)",
    "KOALA_1B": "SDXL (KOALA)",
    "FluxInpaint": "FLUX.1 Fill",
    "Lumina2": "Lumina-Image 2.0 or NewBie",
    "ZImagePixelSpace": "a Z-Image that draws pixels, without an autoencoder",
}
"""What users call some of the others."""

SCHNELL = (
    "this MODEL is FLUX.1-schnell, which maps noise to an image in a few steps and has no velocity "
    "at every sigma that could be trained; connect FLUX.1-dev or a model made from it"
)

SCHEDULE_TOLERANCE = 1e-4
"""Of alpha_bar; float32 tables are within 1e-6."""

KINDS = {"X0": "sample", "V_PREDICTION": "v_prediction", "EPS": "epsilon"}
"""What a network predicts, by ComfyUI's class; the first that is in the family tree counts."""

ENCODERS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5", "qwen3_4b": "qwen3_4b"}
"""ComfyUI's names of text encoders, and the trainer's."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A MODEL that can be trained.

    Attributes:
        family: of `FAMILIES`.
        kind: what its network predicts and how its noise schedule ends, as the config has it; empty
            for flow models.
        notes: what the user should know, one sentence each.
        is_quantised: whether some weights are codes with a factor, or fp8 numbers.
    """

    family: str
    kind: Mapping[str, Any]
    notes: tuple[str, ...]
    is_quantised: bool


def judge(model: Any, clip: Any, vae: Any) -> Judged:
    """Refuse what cannot be trained as it is loaded."""
    family = family_of_model(model)
    if family is None:
        raise NodeError(_unknown(class_of(model)))
    spec = FAMILIES[family]
    parts = {"MODEL": model.model, "CLIP": clip.cond_stage_model, "VAE": vae.first_stage_model}
    notes = [note for name, part in parts.items() if (note := weights_note(name, part))]
    for name, patcher in (("MODEL", model), ("CLIP", clip.patcher), ("VAE", vae.patcher)):
        refuse_patches(name, patcher)
    if clip.apply_hooks_to_conds or clip.patcher.forced_hooks:
        raise NodeError("hooks are set on this CLIP; connect the CLIP from before the hook nodes")
    if vae.patcher.patches:
        raise NodeError("a node has changed this VAE; connect the VAE from before that node")
    _judge_network(spec, model)
    kind = _kind(spec, model)
    if not spec.comfyui.clip_skip and clip.layer_idx is not None:
        raise NodeError(
            f"CLIP Set Last Layer is at {clip.layer_idx}, and {spec.title} reads fixed layers of "
            "its text encoders; connect the CLIP from before that node"
        )
    if demo_id_of(model) is None:  # whose own encoder and VAE are compared number by number
        _judge_clip(spec, model, clip)
        _judge_vae(spec, vae)
    return Judged(family, kind, tuple(notes), bool(notes))


def encoders_of(clip: Any) -> dict[str, Any]:
    """The text encoders of a CLIP, those that are there, by the trainer's names."""
    stage = clip.cond_stage_model
    found = {ours: getattr(stage, theirs, None) for theirs, ours in ENCODERS.items()}
    return {name: encoder for name, encoder in found.items() if encoder is not None}


def asked_shift(model: Any) -> float | None:
    """The shift that a MODEL is to be trained at; None for the one it was published with.

    It is what a ModelSampling node has set or, of some families, what ComfyUI itself draws with.
    """
    family = family_of_model(model)
    has_own = family is not None and FAMILIES[family].comfyui.has_shift
    if "model_sampling" not in model.object_patches and not has_own:
        return None
    return host.shift_of(host.sampling_of(model))


def _unknown(name: str) -> str:
    if name == "FluxSchnell":
        return SCHNELL
    *first, last = (spec.title for spec in FAMILIES.values() if spec.comfyui.classes)
    return (
        f"this MODEL is {NAMES.get(name, name)}, which cannot be trained here yet; connect an "
        f"{', '.join(first)} or {last} model (or one made from them) or PCPO Demo Model"
    )


def _judge_network(spec: FamilySpec, model: Any) -> None:
    config = model.model.model_config.unet_config
    channels = config.get("in_channels", spec.channels)
    if channels != spec.channels:
        raise NodeError(
            f"this MODEL takes {channels} channels, as inpainting and edit models do, which cannot "
            "be trained here; load its text-to-image version"
        )
    for entry, what in spec.comfyui.relatives.items():
        if config.get(entry):
            raise NodeError(
                f"this MODEL is an {spec.title} with {what} ({entry}), which cannot be trained "
                f"here; load {spec.title}"
            )
    try:
        spec.comfyui.judge(config)
    except UserError as error:
        raise NodeError(str(error)) from error


def _kind(spec: FamilySpec, model: Any) -> dict[str, Any]:
    """What the network predicts, and its schedule, as the config has them; others are refused."""
    sampling = host.sampling_of(model)
    if spec.is_flow:
        if host.family_of(sampling) == host.FLOW and getattr(sampling, "shift", None) is not None:
            told = float(sampling.timestep(torch.tensor(1.0)))
            if abs(told - spec.comfyui.time) < 1e-3 and host.shift_of(sampling) > 0:
                return {}
        raise NodeError(
            f"a ModelSampling node gives this MODEL a schedule that is not {spec.title}'s; connect "
            f"the MODEL from before it, or use {spec.comfyui.sampling}"
        )
    tree = [kind.__name__ for kind in type(sampling).__mro__]
    if host.family_of(sampling) == host.DIFFUSION:
        found, usual = host.alpha_bars_of(sampling), scaled_linear_alpha_bars()
        for ends_in_noise, expected in ((False, usual), (True, zero_terminal_snr(usual))):
            if len(found) == len(expected) and (found - expected).abs().max() < SCHEDULE_TOLERANCE:
                predicted = next(name for kind, name in KINDS.items() if kind in tree)
                return {"prediction_type": predicted, "zero_terminal_snr": ends_in_noise}
    raise NodeError(
        f"the noise schedule of this MODEL is not {spec.title}'s; connect the MODEL from before "
        "the ModelSampling node (LCM and the like cannot be trained here)"
    )


def _judge_clip(spec: FamilySpec, model: Any, clip: Any) -> None:
    kind, encoders = type(clip.cond_stage_model).__name__, encoders_of(clip)
    widths = {name: _width_of(encoder) for name, encoder in encoders.items()}
    wanted, told = _text_width(spec, model), spec.comfyui
    is_small = told.clip_alone and widths == {"clip_l": wanted}
    is_known = encoders.keys() <= {*told.encoders} and (kind.startswith(told.clip) or is_small)
    if not encoders or not is_known:
        raise NodeError(f"this CLIP is {kind}, which no {spec.title} reads; {told.loader}")
    _judge_layer(spec, clip)
    attended = told.encoders if told.is_joined else told.encoders[-1:]
    given = told.states * sum(widths[name] for name in attended if name in widths)
    if given not in (0, wanted):
        titles = " and ".join(TITLES[name] for name in attended)
        raise NodeError(
            f"this CLIP's {titles} gives {given} numbers per token and this MODEL reads {wanted}; "
            f"{told.loader}"
        )


def _judge_layer(spec: FamilySpec, clip: Any) -> None:
    """ComfyUI takes the last layer, in another way, of an encoder that has fewer than are skipped;
    that is SD1.x's own (`hand_over`), and what no setting of the trainer does with two.
    """
    if not spec.comfyui.is_joined or clip.layer_idx is None:
        return
    count = min(encoder.num_layers for encoder in encoders_of(clip).values())
    if -clip.layer_idx > count:
        raise NodeError(
            f"CLIP Set Last Layer is at {clip.layer_idx}, and the smaller text encoder of "
            f"{spec.title} has {count} layers; set it to -2, which {spec.title} was trained with"
        )


def _width_of(encoder: Any) -> int:
    """Length of the vector that a text encoder gives a token."""
    return encoder.transformer.get_input_embeddings().weight.shape[-1]


def _text_width(spec: FamilySpec, model: Any) -> int:
    """Numbers a token of the prompt that a network attends to."""
    found = model.model.model_config.unet_config
    for key in spec.comfyui.text_width:
        found = found[key]
    return found


def _judge_vae(spec: FamilySpec, vae: Any) -> None:
    kind = type(vae.first_stage_model).__name__
    if kind not in spec.comfyui.vaes or vae.latent_channels != spec.channels:
        title, file = spec.title, spec.comfyui.vae_file
        mine = f"{title} ({file})" if file else title
        raise NodeError(f"this VAE ({kind}) is not for {title}; connect the VAE of {mine}")
