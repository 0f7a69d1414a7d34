"""Which loaded models can be trained, and why others cannot. Judged before any work.

ComfyUI's classes are told by their names, so that nothing of ComfyUI is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..pcpo.schedules import scaled_linear_alpha_bars
from . import host
from .errors import NodeError

SUPPORTED: dict[str, str] = {"SD15": "SD1.x"}
"""ComfyUI's class of a model that can be trained, and what users call it; others are refused."""

NAMES = {
    "SD20": "SD2.x",
    "SDXL": "SDXL",
    "SDXLRefiner": "SDXL",
    "SSD1B": "SDXL (SSD-1B)",
    "Segmind_Vega": "SDXL (Vega)",
    "KOALA_700M": "SDXL (KOALA)",
    "KOALA_1B": "SDXL (KOALA)",
    "SD3": "SD3.x",
    "Flux": "FLUX",
    "FluxSchnell": "FLUX",
    "Flux2": "FLUX.2",
}
"""What users call some of the others."""

CHOICE = "connect an SD1.x model (SD 1.4, SD 1.5 and what is made from them) or PCPO Demo Model"

SCHEDULE_TOLERANCE = 1e-4
"""Of alpha_bar; float32 tables are within 1e-6."""

KINDS = {"X0": "sample", "V_PREDICTION": "v_prediction", "EPS": "epsilon"}
"""What a network predicts, by ComfyUI's class; the first that is in the family tree counts."""

SCALED_FP8 = "FP8"
"""In the name of a layout of quantised weights that are numbers with one factor."""
QUANTISED_TYPES = {"GGMLTensor": "GGUF", "Params4bit": "NF4", "Int8Params": "int8"}
FLOATS = {torch.float32, torch.float16, torch.bfloat16, torch.float64}
FP8 = {torch.float8_e4m3fn, torch.float8_e5m2}

HARMLESS_OBJECTS = {"model_sampling", "manual_cast_dtype"}
HARMLESS_OPTIONS = {"transformer_options", "disable_cfg1_optimization"}
HARMLESS_TRANSFORMER = {"optimized_attention_override"}
HARMLESS_WRAPPERS = {"torch.compile"}


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found of a MODEL that can be trained.

    Attributes:
        prediction_type: of its network, as the config has it.
        notes: what the user should know, one sentence each.
        is_quantised: whether some weights are codes with a factor, or fp8 numbers.
    """

    prediction_type: str
    notes: tuple[str, ...]
    is_quantised: bool


def judge(model: Any, clip: Any, vae: Any) -> Judged:
    """Refuse what cannot be trained as it is loaded.

    Args:
        model: a MODEL.
        clip: a CLIP.
        vae: a VAE.

    Returns:
        What the hand-over has to know.

    Raises:
        NodeError: naming what it is and what to connect.
    """
    family = type(model.model.model_config).__name__
    if family not in SUPPORTED:
        name = NAMES.get(family, family)
        raise NodeError(f"this MODEL is {name}, which cannot be trained here yet; {CHOICE}")
    parts = {"MODEL": model.model, "CLIP": clip.cond_stage_model, "VAE": vae.first_stage_model}
    notes = [note for name, part in parts.items() if (note := weights_note(name, part))]
    _judge_network(model)
    _judge_clip(clip)
    _judge_width(model, clip)
    _judge_vae(vae)
    return Judged(_prediction_type(model), tuple(notes), bool(notes))


# --- weights -------------------------------------------------------------------------------------


def layout_of(weight: Any) -> str | None:
    """How a weight is coded, where it is one of ComfyUI's quantised ones."""
    return getattr(weight, "_layout_cls", None)


def weights_note(name: str, module: torch.nn.Module) -> str | None:
    """What is done with weights that are no plain floating-point numbers.

    Args:
        name: of the module, for messages.
        module: part of a loaded model.

    Returns:
        One sentence, or None where there are none such; `NodeError` where nothing can be done.
    """
    found = set()
    for key, weight in module.named_parameters():
        layout, kind = layout_of(weight), type(weight).__name__
        if layout is not None and SCALED_FP8 in layout.upper():
            found.add("scaled")
        elif layout is not None or kind in QUANTISED_TYPES:
            _cannot(name, QUANTISED_TYPES.get(kind, layout or kind))
        elif weight.dtype in FP8:
            found.add("plain")
        elif weight.dtype not in FLOATS and key.endswith("weight"):
            _cannot(name, str(weight.dtype).removeprefix("torch."))
    if "scaled" in found:
        return f"the scaled fp8 weights of the {name} were dequantised for training"
    if found:
        return f"the fp8 weights of the {name} were turned into bfloat16 for training"
    return None


def _cannot(name: str, what: str) -> None:
    plain = what.removeprefix("TensorCore").removeprefix("TensorWise").removesuffix("Layout")
    raise NodeError(
        f"the {name} has {plain} weights, which cannot be trained; load the fp16, bf16 or fp8 file "
        "of the same model"
    )


# --- patches that are no weights -----------------------------------------------------------------


def patches_beyond_weights(patcher: Any) -> list[str]:
    """What nodes have put on a model that a checkpoint cannot hold.

    Args:
        patcher: of a MODEL, CLIP or VAE.

    Returns:
        Names, sorted.
    """
    options = patcher.model_options
    found = {key for key, value in options.items() if value and key not in HARMLESS_OPTIONS}
    inside = options.get("transformer_options", {})
    found |= {key for key, value in inside.items() if value and key not in HARMLESS_TRANSFORMER}
    found |= set(patcher.object_patches) - HARMLESS_OBJECTS
    found |= set(patcher.weight_wrapper_patches)
    for name in ("injections", "additional_models", "hook_patches"):
        found |= {str(key) for key, value in getattr(patcher, name).items() if value}
    for wrappers in patcher.wrappers.values():
        found |= {str(k) for k, v in wrappers.items() if v and k not in HARMLESS_WRAPPERS}
    return sorted(found)


def _refuse_patches(name: str, patcher: Any) -> None:
    if found := patches_beyond_weights(patcher):
        shown = ", ".join(found[:3])
        raise NodeError(
            f"the {name} is changed by a node in a way that no checkpoint can hold ({shown}); "
            f"connect the {name} from before that node"
        )


def _judge_network(model: Any) -> None:
    _refuse_patches("MODEL", model)
    channels = model.model.model_config.unet_config.get("in_channels", 4)
    if channels != 4:
        raise NodeError(
            f"this MODEL takes {channels} channels, as inpainting and edit models do, which cannot "
            "be trained here; load its text-to-image version"
        )


def _judge_clip(clip: Any) -> None:
    _refuse_patches("CLIP", clip.patcher)
    if not hasattr(clip.cond_stage_model, "clip_l") or hasattr(clip.cond_stage_model, "clip_g"):
        kind = type(clip.cond_stage_model).__name__
        raise NodeError(f"this CLIP is {kind}, which no SD1.x model reads; connect an SD1.x CLIP")
    if clip.apply_hooks_to_conds or clip.patcher.forced_hooks:
        raise NodeError("hooks are set on this CLIP; connect the CLIP from before the hook nodes")


def _judge_width(model: Any, clip: Any) -> None:
    expected = model.model.model_config.unet_config["context_dim"]
    width = clip.cond_stage_model.clip_l.transformer.get_input_embeddings().weight.shape[-1]
    if width != expected:
        raise NodeError(
            f"this CLIP gives {width} numbers a token and this MODEL reads {expected}; connect "
            "MODEL and CLIP of the same checkpoint"
        )


def _judge_vae(vae: Any) -> None:
    _refuse_patches("VAE", vae.patcher)
    kind = type(vae.first_stage_model).__name__
    if kind not in ("AutoencoderKL", "TAESD") or vae.latent_channels != 4:
        raise NodeError(f"this VAE ({kind}) is none of SD1.x; connect an SD1.x VAE or a TAESD")
    if vae.patcher.patches:
        raise NodeError("a node has changed this VAE; connect the VAE from before that node")


# --- the noise schedule --------------------------------------------------------------------------


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
