"""How FLUX.2 [klein]'s networks are counted, by double and single blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from ..countable import Countable
from .file import load_transformer


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


COUNTABLE = Countable.by_layers(
    Flux2Transformer2DModel, ("num_layers", "num_single_layers"), _call, load_transformer
)
