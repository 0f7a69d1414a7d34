"""SD3's and SD3.5's network from one file: the original names become those of diffusers.

A file has Stability's names, which ComfyUI keeps when it saves, or already diffusers'. The original
fuses q, k and v into one layer, and a modulation without a gate (at the end, and for the text in
the last block) gives the shift first, where diffusers' gives the scale first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from ..assemble import assemble, count_blocks, number_of_blocks, swap_halves
from ..errors import ModelError
from ..source import read_config
from ..weights import Weights
from .header import judge_sd3, network_prefix

CONFIGS = Path(__file__).parent / "configs"

_HEAD = 64  # width of an attention head; the norms of queries tell it, where there are some

TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# Inside a block: the layer, and what its rows are in diffusers, from the first to the last.
BLOCK = {
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
_BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)")


def diffusers_names(module: str) -> tuple[str, ...]:
    """The modules of diffusers' network, in order, that an original layer's rows belong to.

    >>> diffusers_names("joint_blocks.3.x_block.attn.qkv")[1]
    'transformer_blocks.3.attn.to_k'
    >>> diffusers_names("y_embedder.mlp.2"), diffusers_names("norm_out.linear")
    (('time_text_embed.text_embedder.linear_2',), ())
    """
    if module in TOP:
        return (TOP[module],)
    match = _BLOCK.fullmatch(module)
    if match is None:
        return ()
    index, layer = match.groups()
    return tuple(f"transformer_blocks.{index}.{name}" for name in BLOCK.get(layer, ()))


def original_layers(modules: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """The original layers of a network, the modules that their rows are in diffusers, and whether
    the halves of the rows stand the other way round there; `modules` are those of diffusers.
    """
    depth = number_of_blocks(modules)
    swapped = ("norm_out.linear", f"transformer_blocks.{depth - 1}.norm1_context.linear")
    layers = [f"joint_blocks.{i}.{layer}" for i in range(depth) for layer in BLOCK]
    for layer in [*TOP, *layers]:
        names = diffusers_names(layer)
        yield layer, names, names[0] in swapped


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the network's tensors to diffusers' names; parts of fused ones are views.

    Unknown names are kept: those of diffusers are right already, and others are reported when the
    network is filled.
    """
    last = count_blocks(tensors, "joint_blocks") - 1
    swapped = ("final_layer", f"joint_blocks.{last}.context_block")
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        names = diffusers_names(module)
        if key == "pos_embed":
            out["pos_embed.pos_embed"] = tensor
        elif not names:
            out[key] = tensor
        else:
            if module.removesuffix(".adaLN_modulation.1") in swapped:
                tensor = swap_halves(tensor)
            parts = tensor.chunk(len(names))
            out |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return out


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of diffusers' config that differ between SD3 networks; names are diffusers'."""
    width, channels, patch, _ = shapes["pos_embed.proj.weight"]
    context = shapes["context_embedder.weight"]
    layers = count_blocks(shapes, "transformer_blocks")
    positions = math.isqrt(shapes["pos_embed.pos_embed"][1])
    norm = shapes.get("transformer_blocks.0.attn.norm_q.weight")
    return {
        "num_layers": layers,
        "num_attention_heads": width // (norm[0] if norm else _HEAD),
        "attention_head_dim": norm[0] if norm else _HEAD,
        "qk_norm": "rms_norm" if norm else None,
        "dual_attention_layers": [
            i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes
        ],
        "joint_attention_dim": context[1],
        "caption_projection_dim": context[0],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "patch_size": patch,
        "pos_embed_max_size": positions,
    }


def load_transformer(weights: Weights, *, dtype: torch.dtype) -> SD3Transformer2DModel:
    """The network of a file, on the CPU; tensors stored in `dtype` may stay memory-mapped.

    `ModelError` if the network is not laid out as SD3's.
    """
    judge_sd3(weights.header)
    name = weights.header.name
    tensors = to_diffusers(weights.under(network_prefix(weights.header) or "", dtype))
    try:
        sizes = transformer_config({key: tuple(t.shape) for key, t in tensors.items()})
    except KeyError as error:
        raise ModelError(
            f"the network in {name} is not laid out as SD3's: it lacks {error}"
        ) from error
    config = read_config(CONFIGS / "transformer" / "config.json") | sizes
    reach = sizes["pos_embed_max_size"] * sizes["patch_size"]
    config["sample_size"] = min(config["sample_size"], reach)
    kind: Any = SD3Transformer2DModel
    return assemble(lambda: kind.from_config(config), tensors, f"the network in {name}")
