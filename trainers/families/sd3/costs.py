"""How SD3's networks are counted, by blocks with dual attention and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from ..countable import Countable, Depth
from ..embeds import Embeds
from ..flow import FlowSchedule
from .file import CONFIGS, load_transformer
from .model import StableDiffusion3


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

TINY = {
    **{"num_layers": 2, "dual_attention_layers": (0,), "num_attention_heads": 2},
    **{"caption_projection_dim": 128, "joint_attention_dim": 32, "pooled_projection_dim": 16},
    "pos_embed_max_size": 16,
}
"""What makes the network small enough for a test on a CPU."""


def model_of(transformer: Any, vae: Any, dtype: torch.dtype) -> StableDiffusion3:
    """A model of its parts, without text encoders, with the published schedule."""
    return StableDiffusion3(transformer, vae, None, FlowSchedule.of_folder(CONFIGS), dtype)


def random_prompts(config: Any, count: int, text: int) -> Embeds:
    """Prompts as the text encoder would make them, of random numbers."""
    pooled = torch.randn(count, config.pooled_projection_dim)
    return Embeds(torch.randn(count, text, config.joint_attention_dim), pooled)
