"""How Z-Image's networks are counted, by their main blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..countable import Countable, Depth
from .file import load_transformer
from .network import ZImageTransformer2DModel


def _depth(config: Mapping[str, Any]) -> Depth:
    return (config["n_layers"],)


def _make(config: dict[str, Any], depth: Depth) -> nn.Module:
    kind: Any = ZImageTransformer2DModel
    return kind.from_config(config | {"n_layers": depth[0]} if depth else config)


def _call(network: Any, batch: int, side: int, text: int) -> Tensor:
    dtype, config = network.dtype, network.config
    return network(
        torch.empty(batch, config.in_channels, 2 * side, 2 * side, dtype=dtype),
        torch.ones(batch),
        torch.empty(batch, text, config.cap_feat_dim, dtype=dtype),
        torch.full((batch,), text),
        is_ragged=False,
    )


COUNTABLE = Countable(_depth, _make, _call, load_transformer)
