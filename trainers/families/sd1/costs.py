"""How SD1.x's network is counted: whole, as all are of one size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..countable import Countable, Depth
from ..embeds import Embeds
from ..scheduler import SchedulerConfig
from .model import StableDiffusion
from .single_file import CONFIGS


def _make(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = UNet2DConditionModel
    return kind.from_config(config)


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    latents = torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype)
    context = torch.empty(batch, text, config.cross_attention_dim, dtype=dtype)
    return network(latents, torch.ones(batch), encoder_hidden_states=context, return_dict=False)[0]


COUNTABLE = Countable(lambda config: (), _make, _call, None)

TINY = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "cross_attention_dim": 32}
"""What makes the network small enough for a test on a CPU."""


def model_of(unet: Any, vae: Any, dtype: torch.dtype) -> StableDiffusion:
    """A model of its parts, without text encoders, with the published schedule."""
    tokenizer: Any = None
    schedule = SchedulerConfig.of_folder(CONFIGS, None, None)
    return StableDiffusion(unet, vae, None, tokenizer, schedule, dtype)


def random_prompts(config: Any, count: int, text: int) -> Embeds:
    """Prompts as the text encoder would make them, of random numbers."""
    return Embeds(torch.randn(count, text, config.cross_attention_dim))
