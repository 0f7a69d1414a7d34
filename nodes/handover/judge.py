"""Which loaded models can be trained, and why others cannot. Judged before any work.

ComfyUI's classes are told by their names, so that nothing of ComfyUI is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...pcpo.schedules import scaled_linear_alpha_bars
from .. import host
from ..errors import NodeError
from ..families import SD1, class_of, family_of_model
from .judge_flow import judge_flow, width_of
from .state import refuse_patches, weights_note

NAMES = {
    "SD20": "SD2.x",
    "SDXL": "SDXL",
    "SDXLRefiner": "SDXL",
    "SSD1B": "SDXL (SSD-1B)",
    "Segmind_Vega": "SDXL (Vega)",
    "KOALA_700M": "SDXL (KOALA)",
    "KOALA_1B": "SDXL (KOALA)",
    "FluxInpaint": "FLUX.1 Fill",
    "Flux2": "FLUX.2",
}
"""What users call some of the others."""

CHOICE = "connect an SD1.x, SD3.5 or FLUX.1-dev model (or one made from them) or PCPO Demo Model"

SCHNELL = (
    "this MODEL is FLUX.1-schnell, which maps noise to an image in a few steps and has no velocity "
    "at every sigma that could be trained; connect FLUX.1-dev or a model made from it"
)

SCHEDULE_TOLERANCE = 1e-4
"""Of alpha_bar; float32 tables are within 1e-6."""

KINDS = {"X0": "sample", "V_PREDICTION": "v_prediction", "EPS": "epsilon"}
"""What a network predicts, by ComfyUI's class; the first that is in the family tree counts."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A MODEL that can be trained.

    Attributes:
        family: of `kinds`.
        prediction_type: of its network, as the config has it; "auto" for flow models.
        notes: what the user should know, one sentence each.
        is_quantised: whether some weights are codes with a factor, or fp8 numbers.
    """

    family: str
    prediction_type: str
    notes: tuple[str, ...]
    is_quantised: bool


def judge(model: Any, clip: Any, vae: Any) -> Judged:
    """Refuse what cannot be trained as it is loaded.

    Raises:
        NodeError: naming what it is and what to connect.
    """
    family = family_of_model(model)
    if family is None:
        raise NodeError(_unknown(class_of(model)))
    parts = {"MODEL": model.model, "CLIP": clip.cond_stage_model, "VAE": vae.first_stage_model}
    notes = [note for name, part in parts.items() if (note := weights_note(name, part))]
    for name, patcher in (("MODEL", model), ("CLIP", clip.patcher), ("VAE", vae.patcher)):
        refuse_patches(name, patcher)
    if clip.apply_hooks_to_conds or clip.patcher.forced_hooks:
        raise NodeError("hooks are set on this CLIP; connect the CLIP from before the hook nodes")
    if vae.patcher.patches:
        raise NodeError("a node has changed this VAE; connect the VAE from before that node")
    if family != SD1:
        judge_flow(family, model, clip, vae)
        return Judged(family, "auto", tuple(notes), bool(notes))
    _judge_channels(model)
    _judge_clip(model, clip)
    _judge_vae(vae)
    return Judged(family, _prediction_type(model), tuple(notes), bool(notes))


def _unknown(name: str) -> str:
    if name == "FluxSchnell":
        return SCHNELL
    return f"this MODEL is {NAMES.get(name, name)}, which cannot be trained here yet; {CHOICE}"


# --- SD1.x ---------------------------------------------------------------------------------------


def _judge_channels(model: Any) -> None:
    channels = model.model.model_config.unet_config.get("in_channels", 4)
    if channels != 4:
        raise NodeError(
            f"this MODEL takes {channels} channels, as inpainting and edit models do, which cannot "
            "be trained here; load its text-to-image version"
        )


def _judge_clip(model: Any, clip: Any) -> None:
    if not hasattr(clip.cond_stage_model, "clip_l") or hasattr(clip.cond_stage_model, "clip_g"):
        kind = type(clip.cond_stage_model).__name__
        raise NodeError(f"this CLIP is {kind}, which no SD1.x model reads; connect an SD1.x CLIP")
    expected = model.model.model_config.unet_config["context_dim"]
    width = width_of(clip.cond_stage_model.clip_l)
    if width != expected:
        raise NodeError(
            f"this CLIP gives {width} numbers per token and this MODEL reads {expected}; connect "
            "MODEL and CLIP of the same checkpoint"
        )


def _judge_vae(vae: Any) -> None:
    kind = type(vae.first_stage_model).__name__
    if kind not in ("AutoencoderKL", "TAESD") or vae.latent_channels != 4:
        raise NodeError(f"this VAE ({kind}) is not for SD1.x; connect an SD1.x VAE or a TAESD")


def _prediction_type(model: Any) -> str:
    sampling = host.sampling_of(model)
    tree = [kind.__name__ for kind in type(sampling).__mro__]
    if host.family_of(sampling) == host.DIFFUSION:
        found, expected = host.alpha_bars_of(sampling), scaled_linear_alpha_bars()
        if len(found) == len(expected) and (found - expected).abs().max() < SCHEDULE_TOLERANCE:
            return next(name for kind, name in KINDS.items() if kind in tree)
    raise NodeError(
        "the noise schedule of this MODEL is not SD1.x's; connect the MODEL from before the "
        "ModelSampling node (LCM, zero-SNR and the like cannot be trained here)"
    )
