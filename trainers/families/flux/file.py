"""FLUX.1's network from one file: the original names become those of diffusers, at any width.

A file has Black Forest Labs' names, those that ComfyUI saves (its RMS norms have a `weight` where
the original has a `scale`), or already diffusers'. The original fuses q, k and v into one layer,
which in single blocks also holds the first layer of the MLP, and its last modulation gives the
shift first, where diffusers' gives the scale first.

>>> NAMES.in_diffusers("double_blocks.3.txt_attn.proj")
('transformer_blocks.3.attn.to_add_out',)
>>> len(NAMES.in_diffusers("single_blocks.0.linear1")), NAMES.in_diffusers("norm_out.linear")
(4, ())
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from ..assemble import assemble, count_blocks
from ..errors import ModelError
from ..flux_names import SWAPPED, FluxNames
from ..source import read_config
from ..weights import Weights
from .header import HEAD, judge_flux, network_prefix

CONFIGS = Path(__file__).parent / "configs"

_EMBEDDERS = {
    f"{ours}.{layer}": f"time_text_embed.{theirs}.{linear}"
    for ours, theirs in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    )
    for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}
TOP = _EMBEDDERS | {
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
# Inside a block: the layer, and what its rows are in diffusers, from the first to the last.
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
NAMES = FluxNames(TOP, DOUBLE, SINGLE)
original_layers, to_diffusers = NAMES.original_layers, NAMES.to_diffusers


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of diffusers' config that differ between FLUX.1 networks; names are diffusers'."""
    return {
        "num_layers": count_blocks(shapes, "transformer_blocks"),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks"),
        "num_attention_heads": shapes["x_embedder.weight"][0] // HEAD,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
    }


def load_transformer(weights: Weights, *, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The network of a file, on the CPU; tensors stored in `dtype` stay memory-mapped.

    `ModelError` if the network is not laid out as FLUX.1-dev's.
    """
    judge_flux(weights.header)
    name = weights.header.name
    try:
        tensors = to_diffusers(weights.under(network_prefix(weights.header) or "", dtype))
        sizes = transformer_config({key: tuple(t.shape) for key, t in tensors.items()})
    except (KeyError, RuntimeError) as error:
        raise ModelError(f"the network in {name} is not laid out as FLUX.1's: {error}") from error
    config = read_config(CONFIGS / "transformer" / "config.json") | sizes
    kind: Any = FluxTransformer2DModel
    return assemble(lambda: kind.from_config(config), tensors, f"the network in {name}")
