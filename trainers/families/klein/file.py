"""FLUX.2 [klein]'s network from one file: the original names become diffusers', at any width.

A file has Black Forest Labs' names, those that ComfyUI saves (its RMS norms have a `weight` where
the original has a `scale`), or already diffusers'. The original fuses q, k and v of double blocks
into one layer; in single blocks diffusers keeps them, and the MLP, in one. The last modulation
gives the shift first, where diffusers' gives the scale first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from ..assemble import assemble, number_of_blocks, swap_halves
from ..source import read_config
from ..weights import Weights
from .header import HEAD, judge_klein, network_prefix

CONFIGS = Path(__file__).parent / "configs"

SWAPPED = "final_layer.adaLN_modulation.1"
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
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


def diffusers_names(module: str) -> tuple[str, ...]:
    """The modules of diffusers' network, in order, that an original layer's rows belong to.

    >>> diffusers_names("single_blocks.3.linear1")
    ('single_transformer_blocks.3.attn.to_qkv_mlp_proj',)
    >>> len(diffusers_names("double_blocks.0.txt_attn.qkv")), diffusers_names("norm_out.linear")
    (3, ())
    """
    if module in TOP:
        return (TOP[module],)
    match = _BLOCK.fullmatch(module)
    if match is None:
        return ()
    kind, index, layer = match.groups()
    table, folder = (DOUBLE, "") if kind == "double" else (SINGLE, "single_")
    return tuple(f"{folder}transformer_blocks.{index}.{name}" for name in table.get(layer, ()))


def original_layers(modules: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """The original layers of a network, the modules that their rows are in diffusers, and whether
    the halves of the rows stand the other way round there; `modules` are those of diffusers.
    """
    depth = number_of_blocks(modules)
    layers = [f"double_blocks.{i}.{layer}" for i in range(depth) for layer in DOUBLE]
    layers += [f"single_blocks.{i}.{layer}" for i in range(depth) for layer in SINGLE]
    for layer in [*TOP, *layers]:
        yield layer, diffusers_names(layer), layer == SWAPPED


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the network's tensors to diffusers' names; parts of fused ones are views.

    Unknown names are kept: those of diffusers are right already, and others are reported when the
    network is filled.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        names = diffusers_names(module)
        if not names:
            out[key] = tensor
            continue
        if module == SWAPPED:
            tensor = swap_halves(tensor)
        kind = "weight" if kind == "scale" else kind
        parts = tensor.chunk(len(names))
        out |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return out


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of diffusers' config that differ between networks; names are diffusers'."""

    def count(folder: str) -> int:
        indices = {int(m[1]) for key in shapes if (m := re.match(rf"{folder}\.(\d+)\.", key))}
        return max(indices, default=-1) + 1

    return {
        "num_layers": count("transformer_blocks"),
        "num_single_layers": count("single_transformer_blocks"),
        "num_attention_heads": shapes["x_embedder.weight"][0] // HEAD,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
    }


def load_transformer(weights: Weights, *, dtype: torch.dtype) -> Flux2Transformer2DModel:
    """The network of a file, on the CPU; tensors stored in `dtype` stay memory-mapped.

    `ModelError` if the network is not laid out as FLUX.2 [klein]'s.
    """
    judge_klein(weights.header)
    name = weights.header.name
    tensors = to_diffusers(weights.under(network_prefix(weights.header) or "", dtype))
    config = read_config(CONFIGS / "transformer" / "config.json")
    config |= transformer_config({key: tuple(t.shape) for key, t in tensors.items()})
    kind: Any = Flux2Transformer2DModel
    return assemble(lambda: kind.from_config(config), tensors, f"the network in {name}")
