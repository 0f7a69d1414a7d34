"""A tiny FLUX.1-dev: a diffusers folder, and the same model's files in the original names."""

from __future__ import annotations

from pathlib import Path

import torch
from comfyui_pcpo.tests.sd1_fixture import original_tiny_vae, original_vae, shake
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
SCALES = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def tiny_transformer(guidance: bool = True, context: int = 32) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        joint_attention_dim=context,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
    )


def tiny_vae(kind: str) -> AutoencoderKL | AutoencoderTiny:
    if kind == "tiny":
        return AutoencoderTiny(latent_channels=16, **SCALES)
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **SCALES,
    )


def tiny_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModel(config)


def tiny_t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def write_t5_tokenizer(path: Path) -> Path:
    """Letters as tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in LETTERS)]
    T5TokenizerFast(vocab=pieces, extra_ids=0).save_pretrained(path)
    return path


def write_folder(path: Path, vae: str = "kl", guidance: bool = True) -> Path:
    """A diffusers folder; without CLIP's tokenizer, so that the shipped one is used."""
    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for name, module in (
            ("transformer", tiny_transformer(guidance)),
            ("vae", tiny_vae(vae)),
            ("text_encoder", tiny_clip()),
            ("text_encoder_2", tiny_t5()),
        ):
            shake(module).save_pretrained(path / name)
    write_t5_tokenizer(path / "tokenizer_2")
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    schedule.save_pretrained(path / "scheduler")
    return path


# --- the original names --------------------------------------------------------------------------


def original_transformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Black Forest Labs' layout of a network of diffusers."""
    out: dict[str, Tensor] = {}
    left = dict(state)

    def take(name: str, *parts: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            found = [left.pop(f"{part}.{kind}") for part in parts if f"{part}.{kind}" in left]
            if not found:
                continue
            tensor = torch.cat(found) if len(found) > 1 else found[0]
            if swap:  # scale, shift -> shift, scale
                half = len(tensor) // 2
                tensor = torch.cat([tensor[half:], tensor[:half]])
            out[f"{name}.{'scale' if name.endswith('_norm') else kind}"] = tensor

    for ours, theirs in (
        ("time_in", "timestep_embedder"),
        ("guidance_in", "guidance_embedder"),
        ("vector_in", "text_embedder"),
    ):
        take(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        take(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")
    take("img_in", "x_embedder")
    take("txt_in", "context_embedder")
    take("final_layer.linear", "proj_out")
    take("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    for i in range(count(left, "transformer_blocks")):
        old, new = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for side, add, context, q in (
            ("img", "to_{}", "", "norm_{}"),
            ("txt", "add_{}_proj", "_context", "norm_added_{}"),
        ):
            take(f"{old}.{side}_attn.qkv", *(f"{new}.attn.{add.format(c)}" for c in "qkv"))
            take(f"{old}.{side}_attn.norm.query_norm", f"{new}.attn.{q.format('q')}")
            take(f"{old}.{side}_attn.norm.key_norm", f"{new}.attn.{q.format('k')}")
            take(f"{old}.{side}_mod.lin", f"{new}.norm1{context}.linear")
            take(f"{old}.{side}_mlp.0", f"{new}.ff{context}.net.0.proj")
            take(f"{old}.{side}_mlp.2", f"{new}.ff{context}.net.2")
        take(f"{old}.img_attn.proj", f"{new}.attn.to_out.0")
        take(f"{old}.txt_attn.proj", f"{new}.attn.to_add_out")
    for i in range(count(left, "single_transformer_blocks")):
        old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        take(f"{old}.linear1", *(f"{new}.attn.to_{c}" for c in "qkv"), f"{new}.proj_mlp")
        take(f"{old}.linear2", f"{new}.proj_out")
        take(f"{old}.modulation.lin", f"{new}.norm.linear")
        take(f"{old}.norm.query_norm", f"{new}.attn.norm_q")
        take(f"{old}.norm.key_norm", f"{new}.attn.norm_k")
    assert not left, left.keys()
    return out


def count(state: dict[str, Tensor], folder: str) -> int:
    return len({key.split(".")[1] for key in state if key.startswith(f"{folder}.")})


def comfyui_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ComfyUI makes of them when it saves a model."""
    return {key.replace("_norm.scale", "_norm.weight"): t for key, t in tensors.items()}


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in tensors.items()}


def parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a folder's modules in original names: network, vae, clip_l, t5xxl."""
    is_tiny = "AutoencoderTiny" in (folder / "vae" / "config.json").read_text()
    vae = (AutoencoderTiny if is_tiny else AutoencoderKL).from_pretrained(folder / "vae")
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict()
    network = FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict()
    t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_2").state_dict()
    return {
        "network": original_transformer(network),
        "vae": original_tiny_vae(vae) if is_tiny else original_vae(vae),
        "clip_l": {f"text_model.{k.removeprefix('text_model.')}": t for k, t in clip.items()},
        "t5xxl": {k: t for k, t in t5.items() if k != "encoder.embed_tokens.weight"},
    }


def whole(folder: Path) -> dict[str, Tensor]:
    """All in one file, as ComfyUI saves it."""
    found = parts(folder)
    return (
        prefixed("model.diffusion_model.", comfyui_names(found["network"]))
        | prefixed("vae.", found["vae"])
        | prefixed("text_encoders.clip_l.transformer.", found["clip_l"])
        | prefixed("text_encoders.t5xxl.transformer.", found["t5xxl"])
    )


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(plain, path)
    else:
        torch.save(plain, path)
    return path


def full_size() -> nn.Module:
    """FLUX.1-dev's network without memory for its weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)
