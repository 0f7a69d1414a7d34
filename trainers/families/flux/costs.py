"""How FLUX.1's networks are counted, by double and single blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..countable import Countable
from .file import load_transformer


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        hidden_states=torch.empty(batch, side**2, config.in_channels, dtype=dtype),
        timestep=torch.ones(batch),
        guidance=torch.ones(batch),
        encoder_hidden_states=torch.empty(batch, text, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.empty(batch, config.pooled_projection_dim, dtype=dtype),
        img_ids=torch.empty(side**2, 3),
        txt_ids=torch.empty(text, 3),
        return_dict=False,
    )[0]


COUNTABLE = Countable.by_layers(
    FluxTransformer2DModel, ("num_layers", "num_single_layers"), _call, load_transformer
)
