"""The facts of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from ..spec import JOINT_LAYERS, Checkpoint, Demo, FamilySpec, InComfyUI
from ..text.header import SIZES
from .header import CLASS, is_sd3, judge_sd3, judge_sd3_config, judge_sd3_parts

SD3 = FamilySpec(
    name="sd3",
    package=__package__,
    title="SD3.5",
    models="SD3 and SD3.5",
    is_flow=True,
    is_large=True,
    options=frozenset({"base", "text_encoders", "vae", "t5_tokenizer", "t5_length"}),
    settings=("t5_length",),
    takes=is_sd3,
    judge=judge_sd3,
    judge_parts=judge_sd3_parts,
    takes_config=lambda config: config.get("_class_name") == CLASS,
    judge_config=judge_sd3_config,
    folders=("transformer", "vae"),
    network="SD3.5-M",
    checkpoints={
        "sd35-medium": Checkpoint(
            "Stable Diffusion 3.5 Medium",
            "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
            "Stability AI Community License",
        ),
    },
    demos={"demo-flow": Demo("tiny-flow", 24)},
    class_name=CLASS,
    blocks=("JointTransformerBlock",),
    channels=16,
    multiple=16,
    least=512,
    text=333,
    encoders=(SIZES["clip_l"] + SIZES["clip_g"], SIZES["t5"]),
    steps=10,
    transition="flow_sde",
    grid="flow_match_euler",
    # as Flow-GRPO's: the dual attention of SD3.5-M (attn2) is left alone
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    lora_base="sd3",
    lora_architecture="stable-diffusion-3/lora",
    lora_layers=(r"joint_blocks", JOINT_LAYERS),
    is_kohya=False,
    has_original_names=True,
    comfyui=InComfyUI(
        classes=("SD3",),
        clip="SD3ClipModel",
        encoders=("clip_l", "clip_g", "t5"),
        text_width=("context_embedder_config", "params", "in_features"),
        vaes=("AutoencodingEngine", "AutoencoderKL", "TAESD"),
        loader="connect the CLIP of an SD3.5 checkpoint, or clip_l, clip_g and t5xxl by "
        "TripleCLIPLoader",
        sampling="ModelSamplingSD3",
        relatives={"context_processor_layers": "layers of its own for the text"},
    ),
)
