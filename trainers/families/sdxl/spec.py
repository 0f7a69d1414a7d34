"""The facts of Stable Diffusion XL."""

from __future__ import annotations

from ..spec import UNET_LAYERS, Checkpoint, FamilySpec, InComfyUI
from ..text.header import SIZES
from .header import (
    CHANNELS,
    CLASS,
    is_sdxl,
    is_sdxl_config,
    judge_sdxl,
    judge_sdxl_config,
    judge_sdxl_parts,
)

SDXL = FamilySpec(
    name="sdxl",
    package=__package__,
    title="SDXL",
    models="SDXL (base 1.0, and what is made from it, as Pony, Illustrious and NoobAI)",
    is_flow=False,
    is_large=True,
    options=frozenset({"prediction_type", "text_encoders", "vae", "size_condition", "clip_skip"}),
    settings=("size_condition", "clip_skip"),
    takes=is_sdxl,
    judge=judge_sdxl,
    judge_parts=judge_sdxl_parts,
    takes_config=is_sdxl_config,
    judge_config=judge_sdxl_config,
    folders=("unet", "vae", "text_encoder", "text_encoder_2"),
    network="SDXL",
    checkpoints={
        "sdxl": Checkpoint(
            "Stable Diffusion XL base 1.0",
            "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
            "CreativeML Open RAIL++-M",
        ),
    },
    class_name=CLASS,
    blocks=("BasicTransformerBlock",),
    channels=CHANNELS,
    multiple=8,
    least=768,
    text=77,
    encoders=(SIZES["clip_l"] + SIZES["clip_g"], 0),
    steps=25,
    transition="ddim",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    lora_base="sdxl_base_v1-0",
    lora_architecture="stable-diffusion-xl-v1-base/lora",
    lora_layers=(
        r"(unet|attentions).*transformer_blocks[._][1-9][._]",
        UNET_LAYERS,
    ),
    lora_notes={"ss_v2": False},
    relatives={
        "NoobAI": r"(?i)noob",
        "Illustrious": r"(?i)illustrious|(?<![a-z])ilx?l?(?![a-z])",
        "Pony": r"(?i)pony",
        "SDXL 1.0": r"(?i)sd_?xl_?(?:base|1)",
    },
    is_kohya=True,
    has_original_names=True,
    comfyui=InComfyUI(
        classes=("SDXL",),
        clip="SDXLClipModel",
        encoders=("clip_l", "clip_g"),
        is_joined=True,
        clip_skip=True,
        text_width=("context_dim",),
        vaes=("AutoencoderKL", "TAESD"),
        loader="connect the CLIP of an SDXL checkpoint, or clip_l and clip_g by DualCLIPLoader, "
        "type sdxl",
        heeds_marks=True,
    ),
)
