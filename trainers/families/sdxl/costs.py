"""How SDXL's network is counted: whole, as all are of one size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..countable import Countable, Depth
from .header import SIZES


def _make(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = UNet2DConditionModel
    return kind.from_config(config)


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    pooled = config.projection_class_embeddings_input_dim - SIZES
    return network(
        torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype),
        torch.ones(batch),
        encoder_hidden_states=torch.empty(batch, text, config.cross_attention_dim, dtype=dtype),
        added_cond_kwargs={
            "text_embeds": torch.empty(batch, pooled, dtype=dtype),
            "time_ids": torch.empty(batch, 6),
        },
        return_dict=False,
    )[0]


COUNTABLE = Countable(lambda config: (), _make, _call, None)
