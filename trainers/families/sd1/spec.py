"""The facts of Stable Diffusion 1.x."""

from __future__ import annotations

from ..spec import UNET_LAYERS, Checkpoint, Demo, FamilySpec, InComfyUI
from ..text.header import SIZES
from .header import is_sd1, is_sd1_config, judge_sd1, judge_sd1_config

SD1 = FamilySpec(
    name="sd1",
    package=__package__,
    title="SD1.x",
    models="SD1.x (SD 1.4, SD 1.5 and what is made from them)",
    is_flow=False,
    is_large=False,
    options=frozenset({"prediction_type"}),
    takes=is_sd1,
    judge=judge_sd1,
    judge_parts=None,
    takes_config=is_sd1_config,
    judge_config=judge_sd1_config,
    folders=("unet", "vae", "text_encoder"),
    network="SD1.5",
    checkpoints={
        "sd14": Checkpoint(
            "Stable Diffusion 1.4",
            "https://huggingface.co/CompVis/stable-diffusion-v1-4",
            "CreativeML OpenRAIL-M",
        ),
        "sd15": Checkpoint(
            "Stable Diffusion 1.5",
            "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
            "CreativeML OpenRAIL-M",
        ),
    },
    demos={"demo": Demo("tiny-sd", 77)},
    class_name="UNet2DConditionModel",
    blocks=("BasicTransformerBlock",),
    channels=4,
    multiple=1,  # the autoencoder says more
    least=384,
    text=77,
    encoders=(SIZES["clip_l"], 0),
    steps=50,
    transition="ddim",
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    lora_base="sd_v1",
    lora_architecture="stable-diffusion-v1/lora",
    lora_layers=(
        r"down_blocks[._]0[._]attentions|input_blocks[._]1[._]1",
        UNET_LAYERS,
    ),
    lora_notes={"ss_v2": False},
    is_kohya=True,
    has_original_names=True,
    comfyui=InComfyUI(
        classes=("SD15",),
        clip="",
        encoders=("clip_l",),
        clip_skip=True,
        text_width=("context_dim",),
        vaes=("AutoencoderKL", "TAESD"),
        loader="connect the CLIP of an SD1.x checkpoint",
    ),
)
