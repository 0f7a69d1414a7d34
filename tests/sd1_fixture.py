"""Tiny random SD1.x models, as a diffusers folder and as one file in the original names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def tiny_unet(layers: int = 1) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=layers,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )


def tiny_vae(kind: str) -> AutoencoderKL | AutoencoderTiny:
    if kind == "tiny":
        return AutoencoderTiny(scaling_factor=0.18215)
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.18215,
    )


def tiny_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config)


def shake(module: nn.Module) -> nn.Module:
    """Make every parameter matter: biases that are all 0 and norms that are all 1 hide mix-ups."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def write_folder(path: Path, vae: str = "kl", layers: int = 1, **scheduler: object) -> Path:
    """A diffusers folder; without a tokenizer, so that the shipped one is used."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, module in (
            ("unet", tiny_unet(layers)),
            ("vae", tiny_vae(vae)),
            ("text_encoder", tiny_text_encoder()),
        ):
            shake(module).save_pretrained(path / name)
    DDIMScheduler(**(SCHEDULER | scheduler)).save_pretrained(path / "scheduler")
    return path


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def original_unet_name(key: str, layers: int, attends_up: tuple[bool, ...]) -> str:
    for ours, theirs in _UNET_TOP.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    side, rest = key.split(".", 1)
    block = 0 if side == "mid_block" else int(rest.split(".", 1)[0])
    rest = rest if side == "mid_block" else rest.split(".", 1)[1]
    kind, index, rest = rest.split(".", 2)
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 + attends_up[block]}.{rest}"
    if kind == "resnets":
        name, end = rest.split(".", 1)
        rest = f"{_RESNET[name]}.{end}"
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{rest}"
    place = first + int(index) + (side == "down_blocks")
    folder = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{folder}.{place}.{int(kind == 'attentions')}.{rest}"


_VAE_RULES = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def original_vae(vae: AutoencoderKL) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    out = {}
    for key, tensor in vae.state_dict().items():
        for pattern, name in _VAE_RULES:
            key = re.sub(pattern, name, key)
        key = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{last - int(m[1])}.", key)
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key):
            tensor = tensor[:, :, None, None]  # the original code has 1 x 1 convolutions
        out[key] = tensor
    return out


def original_tiny_vae(vae: AutoencoderTiny) -> dict[str, Tensor]:
    out = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for key, tensor in vae.state_dict().items():
        part, _, layer, rest = key.split(".", 3)
        out[f"taesd_{part}.{int(layer) + (part == 'decoder')}.{rest}"] = tensor
    return out


def original_names(folder: Path, layers: int = 1) -> dict[str, Tensor]:
    """The tensors of a folder in the names of a single SD1.x checkpoint."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    attends_up = tuple(kind.startswith("Cross") for kind in unet.config.up_block_types)
    out = {
        f"model.diffusion_model.{original_unet_name(key, layers, attends_up)}": tensor
        for key, tensor in unet.state_dict().items()
    }
    is_tiny = "AutoencoderTiny" in (folder / "vae" / "config.json").read_text()
    vae = (AutoencoderTiny if is_tiny else AutoencoderKL).from_pretrained(folder / "vae")
    vae_tensors = original_tiny_vae(vae) if is_tiny else original_vae(vae)
    out |= {f"first_stage_model.{key}": tensor for key, tensor in vae_tensors.items()}
    text = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    for key, tensor in text.items():
        name = key.removeprefix("text_model.")
        out[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return out


def write_single_file(folder: Path, path: Path, layers: int = 1, **metadata: str) -> Path:
    tensors = {k: t.contiguous() for k, t in original_names(folder, layers).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata=metadata or None)
    else:
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    return path
