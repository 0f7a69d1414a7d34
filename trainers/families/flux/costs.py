"""How FLUX.1's networks are counted, by double and single blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from ..countable import Countable
from ..embeds import Embeds
from ..flow import FlowSchedule
from .file import CONFIGS, load_transformer
from .model import Flux


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

TINY = {
    **{"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    **{"joint_attention_dim": 32, "pooled_projection_dim": 16},
}
"""What makes the network small enough for a test on a CPU."""


def model_of(transformer: Any, vae: Any, dtype: torch.dtype) -> Flux:
    """A model of its parts, without text encoders, with the published schedule."""
    return Flux(transformer, vae, None, None, FlowSchedule.of_folder(CONFIGS), dtype)


def random_prompts(config: Any, count: int, text: int) -> Embeds:
    """Prompts as the text encoder would make them, of random numbers."""
    pooled = torch.randn(count, config.pooled_projection_dim)
    return Embeds(torch.randn(count, text, config.joint_attention_dim), pooled)
