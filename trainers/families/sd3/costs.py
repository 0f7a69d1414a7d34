"""How SD3's networks are counted, by blocks with dual attention and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..countable import Countable, Depth
from .file import load_transformer


def _depth(config: Mapping[str, Any]) -> Depth:
    dual = len(config.get("dual_attention_layers") or ())
    return dual, config["num_layers"] - dual


def _make(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = SD3Transformer2DModel
    if not depth:
        return kind.from_config(config)
    dual, plain = depth
    layers = {"num_layers": dual + plain, "dual_attention_layers": tuple(range(dual))}
    return kind.from_config(config | layers)


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        hidden_states=torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype),
        timestep=torch.ones(batch),
        encoder_hidden_states=torch.empty(batch, text, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        return_dict=False,
    )[0]


COUNTABLE = Countable(_depth, _make, _call, load_transformer)
