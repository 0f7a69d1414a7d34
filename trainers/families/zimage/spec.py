"""The facts of Z-Image."""

from __future__ import annotations

from ..spec import Checkpoint, FamilySpec, InComfyUI
from .header import (
    CHANNELS,
    CLASS,
    VAE_FILE,
    is_turbo,
    is_zimage,
    judge_zimage,
    judge_zimage_config,
    judge_zimage_parts,
)

ZIMAGE = FamilySpec(
    name="zimage",
    package=__package__,
    title="Z-Image",
    models="Z-Image",
    is_flow=True,
    is_large=True,
    options=frozenset({"base", "text_encoders", "vae", "qwen_tokenizer", "train_distilled"}),
    takes=is_zimage,
    judge=judge_zimage,
    judge_parts=judge_zimage_parts,
    takes_config=lambda config: config.get("_class_name") == CLASS,
    judge_config=judge_zimage_config,
    is_distilled=is_turbo,
    folders=("transformer", "vae", "text_encoder"),
    network="Z-Image",
    checkpoints={
        "z-image": Checkpoint(
            "Z-Image", "https://huggingface.co/Tongyi-MAI/Z-Image", "Apache License 2.0"
        ),
    },
    class_name=CLASS,
    blocks=("ZImageTransformerBlock",),
    packed=("layers.", "noise_refiner.", "context_refiner."),
    channels=CHANNELS,
    multiple=16,
    least=512,
    doubtful_optimizers=("adamw8bit",),
    text=128,
    encoders=(0, 3_921_534_720),  # Qwen3-4B without its last layer
    steps=16,
    transition="flow_sde",
    grid="inverse_count",
    # the refiners' layers have other names elsewhere: attention of all blocks, nothing else
    lora_targets=tuple(f"attention.{end}" for end in ("to_q", "to_k", "to_v", "to_out.0")),
    lora_base="zimage",
    lora_architecture="z-image/lora",
    lora_layers=(r"noise_refiner|context_refiner|(?<!encoder[._])layers[._]\d",),
    is_kohya=False,
    lora_prefix="diffusion_model.",
    has_original_names=True,
    comfyui=InComfyUI(
        classes=("ZImage",),
        clip="ZImageTEModel",
        encoders=("qwen3_4b",),
        text_width=("cap_feat_dim",),
        vaes=("AutoencodingEngine", "AutoencoderKL", "TAESD"),
        vae_file=VAE_FILE,
        loader="connect qwen_3_4b by CLIPLoader, type lumina2",
        time=1.0,
        sampling="ModelSamplingAuraFlow",
        has_shift=True,  # 3, of the base and of Turbo; the published config of the base has 6
        relatives={"siglip_feat_dim": "a part that reads images, as Omni and Edit have"},
    ),
)
