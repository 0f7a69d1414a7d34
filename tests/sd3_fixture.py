"""Tiny random SD3 models, as a diffusers folder and in the layouts of single files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from comfyui_pcpo.tests.sd1_fixture import original_vae, shake
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

# The published models' architectures and numbers of parameters.
FULL = {
    "sd3.5-m": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd3.5-l": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "sd3-m": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
}
PARAMETERS = {"sd3.5-m": 2_243_171_520, "sd3.5-l": 8_056_627_520, "sd3-m": 2_028_328_000}

WIDTH_L, WIDTH_G, WIDTH = 16, 24, 64


def transformer(kind: str) -> SD3Transformer2DModel:
    """A network with the features of a kind; SD3-M's file tells no head width: 64."""
    heads, head = (2, 64) if kind == "sd3-m" else (4, 8)
    return SD3Transformer2DModel(
        sample_size=16,
        num_layers=3,
        num_attention_heads=heads,
        attention_head_dim=head,
        caption_projection_dim=heads * head,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH_L + WIDTH_G,
        pos_embed_max_size=8,
        dual_attention_layers=(0, 1) if kind == "sd3.5-m" else (),
        qk_norm=None if kind == "sd3-m" else "rms_norm",
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def clip(width: int, layers: int, activation: str) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=77,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    return CLIPTextModelWithProjection(config)


def t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=48,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def write_t5_tokenizer(path: Path) -> Path:
    words = ["a", "red", "circle", "left", "of", "blue", "square"]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words)]
    pieces += [chr(c) for c in range(ord("a"), ord("z") + 1)]
    scores = [(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    config = {"tokenizer_class": "T5TokenizerFast", **special}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def modules(kind: str) -> dict[str, nn.Module]:
    """All modules of a model; CLIP-L is projected by the identity, as in the published folders."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = {
            "transformer": shake(transformer(kind)),
            "vae": shake(vae()),
            "text_encoder": shake(clip(WIDTH_L, 3, "quick_gelu")),
            "text_encoder_2": shake(clip(WIDTH_G, 2, "gelu")),
            "text_encoder_3": shake(t5()),
        }
    with torch.no_grad():
        made["text_encoder"].text_projection.weight.copy_(torch.eye(WIDTH_L))
    return {name: module.requires_grad_(False).eval() for name, module in made.items()}


def write_folder(path: Path, kind: str = "sd3.5-m") -> Path:
    """A diffusers folder; CLIP's tokenizers are left out, so that the shipped one is used."""
    for name, module in modules(kind).items():
        module.save_pretrained(path / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    write_t5_tokenizer(path / "tokenizer_3")
    return path


# --- the names of single files -------------------------------------------------------------------

_TRANSFORMER = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.add_([qkv])_proj\.", r".context_block.attn.\1."),
    (r"\.(attn2?)\.to_([qkv])\.", r".x_block.\1.\2."),
)


def original_transformer(model: SD3Transformer2DModel) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        for pattern, name in _TRANSFORMER:
            key = re.sub(pattern, name, key)
        last = f"joint_blocks.{model.config.num_layers - 1}.context_block.adaLN"
        if key.startswith(("final_layer.adaLN", last)):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        out[key] = tensor
    for key in [key for key in out if re.search(r"attn2?\.q\.", key)]:
        parts = [out.pop(re.sub(r"\.q\.", f".{part}.", key)) for part in "qkv"]
        out[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return out


def original_clip(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    """As ComfyUI and Stability name them, which is as transformers does."""
    return dict(model.state_dict())


_OPEN_CLIP = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.fc1\.", ".c_fc."),
    (r"\.fc2\.", ".c_proj."),
    (r"\.self_attn\.", ".attn."),
)


def open_clip(model: CLIPTextModelWithProjection) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6), "visual.proj": torch.ones(2, 2)}
    for key, tensor in model.state_dict().items():
        for pattern, name in _OPEN_CLIP:
            key = re.sub(pattern, name, key)
        out[key] = tensor
    out["text_projection"] = out.pop("text_projection.weight").T
    for key in [key for key in out if ".attn.q_proj." in key]:
        parts = [out.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        out[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return out


def original_t5(model: T5EncoderModel) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    tensors.pop("encoder.embed_tokens.weight", None)
    return tensors


def original_names(made: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A whole checkpoint, as ComfyUI and Stability name its tensors."""
    parts = {
        "model.diffusion_model.": original_transformer(made["transformer"]),
        "first_stage_model.": original_vae(made["vae"]),
        "text_encoders.clip_l.transformer.": original_clip(made["text_encoder"]),
        "text_encoders.clip_g.transformer.": original_clip(made["text_encoder_2"]),
        "text_encoders.t5xxl.transformer.": original_t5(made["text_encoder_3"]),
    }
    return {
        prefix + key: tensor.detach().clone().contiguous()
        for prefix, tensors in parts.items()
        for key, tensor in tensors.items()
    }


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    plain = {key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        save_file(plain, path)
    else:
        torch.save({"state_dict": plain, "global_step": 1}, path)
    return path
