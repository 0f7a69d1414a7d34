"""How FLUX.2 [klein]'s networks are counted, by double and single blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from ..countable import Countable, Depth
from .file import load_transformer


def _depth(config: Mapping[str, Any]) -> Depth:
    return config["num_layers"], config["num_single_layers"]


def _make(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = Flux2Transformer2DModel
    if not depth:
        return kind.from_config(config)
    return kind.from_config(config | {"num_layers": depth[0], "num_single_layers": depth[1]})


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        hidden_states=torch.empty(batch, side**2, config.in_channels, dtype=dtype),
        timestep=torch.ones(batch),
        guidance=None,
        encoder_hidden_states=torch.empty(batch, text, config.joint_attention_dim, dtype=dtype),
        img_ids=torch.empty(side**2, 4),
        txt_ids=torch.empty(text, 4),
        return_dict=False,
    )[0]


COUNTABLE = Countable(_depth, _make, _call, load_transformer)
