"""The facts of FLUX.2 [klein] 4B."""

from __future__ import annotations

from ..spec import FLUX_LAYERS, Checkpoint, FamilySpec, InComfyUI
from .header import (
    CHANNELS,
    CLASS,
    STATES,
    VAE_FILE,
    is_distilled,
    is_klein,
    judge_klein,
    judge_klein_config,
    judge_klein_in_comfyui,
    judge_klein_parts,
)

KLEIN = FamilySpec(
    name="klein",
    package=__package__,
    title="FLUX.2 [klein]",
    models="FLUX.2 [klein] 4B",
    is_flow=True,
    is_large=True,
    options=frozenset({"base", "text_encoders", "vae", "qwen_tokenizer", "train_distilled"}),
    takes=is_klein,
    judge=judge_klein,
    judge_parts=judge_klein_parts,
    takes_config=lambda config: config.get("_class_name") == CLASS,
    judge_config=judge_klein_config,
    is_distilled=is_distilled,
    folders=("transformer", "vae", "text_encoder"),
    network="FLUX.2-klein-4B",
    checkpoints={
        "flux2-klein-base-4b": Checkpoint(
            "FLUX.2 [klein] base 4B",
            "https://huggingface.co/black-forest-labs/FLUX.2-klein-base-4B",
            "Apache License 2.0",
        ),
    },
    class_name=CLASS,
    blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    channels=CHANNELS,
    factor=16,
    multiple=16,
    least=512,
    text=512,
    encoders=(0, 3_114_088_192),  # Qwen3-4B up to the last layer that is read
    steps=20,
    transition="flow_sde",
    grid="inverse_count",
    # the last two are of the single blocks, whose MLP shares a layer with the attention
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("attn.to_qkv_mlp_proj", "attn.to_out"),
    ),
    lora_base="flux2_klein_4b",
    lora_architecture="flux.2-klein-4b/lora",
    lora_layers=FLUX_LAYERS,
    is_kohya=False,
    is_scale_folded=True,  # diffusers reads no alpha of such a file, ComfyUI does
    has_original_names=True,
    comfyui=InComfyUI(
        classes=("Flux2",),
        clip="Flux2TEModel",
        encoders=("qwen3_4b",),
        text_width=("context_in_dim",),
        states=STATES,
        vaes=("AutoencoderKL", "TAESD"),
        vae_file=VAE_FILE,
        loader="connect qwen_3_4b by CLIPLoader, type flux2",
        time=1.0,
        sampling="ModelSamplingFlux",
        judge=judge_klein_in_comfyui,
        renamed=(("_norm.weight", "_norm.scale"),),
    ),
)
