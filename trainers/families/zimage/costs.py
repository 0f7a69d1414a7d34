"""How Z-Image's networks are counted, by their main blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..countable import Countable
from .file import load_transformer
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
