"""FLUX.2 [klein]'s network from one file: the original names become diffusers', at any width.

A file has Black Forest Labs' names, those that ComfyUI saves (its RMS norms have a `weight` where
the original has a `scale`), or already diffusers'. The original fuses q, k and v of double blocks
into one layer; in single blocks diffusers keeps them, and the MLP, in one. The last modulation
gives the shift first, where diffusers' gives the scale first.

>>> NAMES.in_diffusers("single_blocks.3.linear1")
('single_transformer_blocks.3.attn.to_qkv_mlp_proj',)
>>> len(NAMES.in_diffusers("double_blocks.0.txt_attn.qkv")), NAMES.in_diffusers("norm_out.linear")
(3, ())
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel

from ..assemble import assemble, count_blocks
from ..errors import ModelError
from ..flux_names import SWAPPED, FluxNames
from ..source import read_config
from ..weights import Weights
from .header import HEAD, judge_klein, network_prefix

CONFIGS = Path(__file__).parent / "configs"

_TIMES = "time_guidance_embed.timestep_embedder"
TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{_TIMES}.linear_1",
    "time_in.out_layer": f"{_TIMES}.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    SWAPPED: "norm_out.linear",
}
# Inside a block: the layer, and what its rows are in diffusers, from the first to the last.
DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
NAMES = FluxNames(TOP, DOUBLE, SINGLE)
original_layers, to_diffusers = NAMES.original_layers, NAMES.to_diffusers


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of diffusers' config that differ between networks; names are diffusers'."""
    return {
        "num_layers": count_blocks(shapes, "transformer_blocks"),
        "num_single_layers": count_blocks(shapes, "single_transformer_blocks"),
        "num_attention_heads": shapes["x_embedder.weight"][0] // HEAD,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def load_transformer(weights: Weights, *, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """The network of a file, on the CPU; tensors stored in `dtype` stay memory-mapped.

    `ModelError` if the network is not laid out as FLUX.2 [klein]'s.
    """
    judge_klein(weights.header)
    name = weights.header.name
    try:
        tensors = to_diffusers(weights.under(network_prefix(weights.header) or "", dtype))
        sizes = transformer_config({key: tuple(t.shape) for key, t in tensors.items()})
    except (KeyError, RuntimeError) as error:
        text = f"the network in {name} is not laid out as FLUX.2 [klein]'s: {error}"
        raise ModelError(text) from error
    config = read_config(CONFIGS / "transformer" / "config.json") | sizes
    kind: Any = Flux2Transformer2DModel
    return assemble(lambda: kind.from_config(config), tensors, f"the network in {name}")
