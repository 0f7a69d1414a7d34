"""How Z-Image's networks are counted, by their main blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..countable import Countable
from ..embeds import Embeds
from ..flow import FlowSchedule
from .file import CONFIGS, load_transformer
from .model import ZImage
from .network import ZImageTransformer2DModel


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype),
        torch.ones(batch),
        torch.empty(batch, text, config.cap_feat_dim, dtype=dtype),
        torch.full((batch,), text),
        is_ragged=False,
    )


COUNTABLE = Countable.by_layers(ZImageTransformer2DModel, ("n_layers",), _call, load_transformer)

TINY = {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "n_refiner_layers": 1} | {
    "cap_feat_dim": 32
}
"""What makes the network small enough for a test on a CPU."""


def model_of(transformer: Any, vae: Any, dtype: torch.dtype) -> ZImage:
    """A model of its parts, without text encoders, with the published schedule."""
    return ZImage(transformer, vae, None, FlowSchedule.of_folder(CONFIGS), dtype)


def random_prompts(config: Any, count: int, text: int) -> Embeds:
    """Prompts as the text encoder would make them, of random numbers."""
    return Embeds.from_rows([""] * count, list(torch.randn(count, text, config.cap_feat_dim)))
