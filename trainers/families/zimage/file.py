"""Z-Image's network from one file: the original names become those of diffusers, at any width.

A file has the original names, which ComfyUI keeps when it saves, or already diffusers'. The
original fuses q, k and v into one layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..assemble import assemble, count_blocks
from ..source import read_config
from ..weights import Weights
from .header import HEAD, judge_zimage, network_prefix
from .network import ZImageTransformer2DModel

CONFIGS = Path(__file__).parent / "configs"

_UNUSED = ("norm_final.weight",)  # in some files; no network has it
_TOP = {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}
_ATTENTION = {
    "qkv": ("to_q", "to_k", "to_v"),
    "out": ("to_out.0",),
    "q_norm": ("norm_q",),
    "k_norm": ("norm_k",),
}


def diffusers_names(module: str) -> tuple[str, ...]:
    """The modules of diffusers' network, in order, that an original layer's rows belong to.

    >>> diffusers_names("layers.3.attention.qkv")[1]
    'layers.3.attention.to_k'
    >>> diffusers_names("final_layer.linear"), diffusers_names("cap_embedder.1")
    (('all_final_layer.2-1.linear',), ('cap_embedder.1',))
    """
    block, attention, layer = module.rpartition(".attention.")
    if attention and layer in _ATTENTION:
        return tuple(f"{block}.attention.{name}" for name in _ATTENTION[layer])
    first, dot, rest = module.partition(".")
    return (f"{_TOP.get(first, first)}{dot}{rest}",)


def original_layers(modules: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """The original layers of a network that diffusers calls otherwise, and the modules that their
    rows are in diffusers, whose `modules` are given; no halves are swapped.
    """
    ends = (*(".attention.to_q", "qkv"), *(".attention.to_out.0", "out"))
    for path in modules:
        for end, layer in zip(ends[::2], ends[1::2], strict=True):
            if path.endswith(end):
                original = f"{path.removesuffix(end)}.attention.{layer}"
                yield original, diffusers_names(original), False
    for layer in ("x_embedder", "final_layer.linear", "final_layer.adaLN_modulation.1"):
        yield layer, diffusers_names(layer), False


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the network's tensors to diffusers' names; parts of fused ones are views.

    Unknown names are kept: those of diffusers are right already, and others are reported when the
    network is filled.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if not module:  # x_pad_token and cap_pad_token
            out[key] = tensor
        elif key not in _UNUSED:
            names = diffusers_names(module)
            parts = tensor.chunk(len(names))
            out |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
    return out


def transformer_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of diffusers' config that differ between networks; names are diffusers'."""
    width, context = shapes["cap_embedder.1.weight"]
    return {
        "dim": width,
        "n_heads": width // HEAD,
        "n_kv_heads": width // HEAD,
        "cap_feat_dim": context,
        "n_layers": count_blocks(shapes, "layers"),
        "n_refiner_layers": count_blocks(shapes, "noise_refiner"),
    }


def load_transformer(weights: Weights, *, dtype: torch.dtype) -> ZImageTransformer2DModel:
    """The network of a file, on the CPU; tensors stored in `dtype` stay memory-mapped.

    `ModelError` if the network is not laid out as Z-Image's.
    """
    judge_zimage(weights.header)
    name = weights.header.name
    tensors = to_diffusers(weights.under(network_prefix(weights.header) or "", dtype))
    config = read_config(CONFIGS / "transformer" / "config.json")
    config |= transformer_config({key: tuple(t.shape) for key, t in tensors.items()})
    kind: Any = ZImageTransformer2DModel
    return assemble(lambda: kind.from_config(config), tensors, f"the network in {name}")
