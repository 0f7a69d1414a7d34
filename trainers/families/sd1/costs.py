"""How SD1.x's network is counted: whole, as all are of one size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..countable import Countable, Depth


def _make(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = UNet2DConditionModel
    return kind.from_config(config)


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    latents = torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype)
    context = torch.empty(batch, text, config.cross_attention_dim, dtype=dtype)
    return network(latents, torch.ones(batch), encoder_hidden_states=context, return_dict=False)[0]


COUNTABLE = Countable(lambda config: (), _make, _call, None)
