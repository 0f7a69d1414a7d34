"""How FLUX.2 [klein]'s networks are counted, by double and single blocks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch import Tensor

from ..countable import Countable
from ..embeds import Embeds
from .file import CONFIGS, load_transformer
from .model import Klein, schedule_of


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

TINY = {
    **{"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2},
    "joint_attention_dim": 48,
}
"""What makes the network small enough for a test on a CPU."""


AUTOENCODER = AutoencoderKLFlux2


def model_of(transformer: Any, vae: Any, dtype: torch.dtype) -> Klein:
    """A model of its parts, without text encoders, with the published schedule."""
    return Klein(transformer, vae, None, schedule_of(CONFIGS), dtype)


def random_prompts(config: Any, count: int, text: int) -> Embeds:
    """Prompts as the text encoder would make them, of random numbers."""
    return Embeds(torch.randn(count, text, config.joint_attention_dim))
