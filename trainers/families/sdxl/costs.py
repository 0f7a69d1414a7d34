"""How SDXL's network is counted: whole, as all are of one size."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..countable import Countable, Depth
from ..embeds import Embeds
from ..scheduler import SchedulerConfig
from .file import CONFIGS
from .header import SIZES
from .model import StableDiffusionXL


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

TINY = {
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 32,
    "addition_time_embed_dim": SIZES // 6,
    "projection_class_embeddings_input_dim": SIZES + 16,
}
"""What makes the network small enough for a test on a CPU."""


def model_of(unet: Any, vae: Any, dtype: torch.dtype) -> StableDiffusionXL:
    """A model of its parts, without text encoders, with the published schedule."""
    schedule = SchedulerConfig.of_folder(CONFIGS, None, None)
    return StableDiffusionXL(unet, vae, None, schedule, dtype)


def random_prompts(config: Any, count: int, text: int) -> Embeds:
    """Prompts as the text encoder would make them, of random numbers."""
    pooled = torch.randn(count, config.projection_class_embeddings_input_dim - SIZES)
    return Embeds(torch.randn(count, text, config.cross_attention_dim), pooled)
