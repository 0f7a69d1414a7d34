"""The facts of FLUX.1-dev."""

from __future__ import annotations

from ..spec import FLUX_LAYERS, Checkpoint, FamilySpec, InComfyUI
from ..text.header import SIZES
from .header import CLASS, VAE_FILE, is_flux, judge_flux, judge_flux_config, judge_flux_parts

FLUX = FamilySpec(
    name="flux",
    package=__package__,
    title="FLUX",
    models="FLUX.1-dev",
    is_flow=True,
    is_large=True,
    options=frozenset({"base", "text_encoders", "vae", "t5_tokenizer", "t5_length", "guidance"}),
    settings=("t5_length", "guidance"),
    takes=is_flux,
    judge=judge_flux,
    judge_parts=judge_flux_parts,
    takes_config=lambda config: config.get("_class_name") == CLASS,
    judge_config=judge_flux_config,
    folders=("transformer", "vae"),
    network="FLUX.1-dev",
    checkpoints={
        "flux1-dev": Checkpoint(
            "FLUX.1-dev",
            "https://huggingface.co/black-forest-labs/FLUX.1-dev",
            "FLUX.1 [dev] Non-Commercial License",
        ),
    },
    class_name=CLASS,
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    channels=16,
    multiple=16,
    least=512,
    text=512,
    encoders=(SIZES["clip_l"], SIZES["t5"]),
    steps=16,
    transition="dance_sde",
    grid="uniform",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    lora_base="flux1",
    lora_architecture="flux-1-dev/lora",
    lora_layers=FLUX_LAYERS,
    is_kohya=False,
    has_original_names=True,
    comfyui=InComfyUI(
        classes=("Flux",),
        clip="FluxClipModel",
        encoders=("clip_l", "t5"),
        clip_alone=True,
        text_width=("context_in_dim",),
        vaes=("AutoencodingEngine", "AutoencoderKL", "TAESD"),
        vae_file=VAE_FILE,
        loader="connect clip_l and t5xxl by DualCLIPLoader, type flux",
        time=1.0,
        sampling="ModelSamplingFlux",
        renamed=(("_norm.weight", "_norm.scale"),),
    ),
)
