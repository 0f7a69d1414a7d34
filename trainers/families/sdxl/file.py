"""SDXL's network from one file, in the original names or in diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..architecture import unet_config
from ..assemble import assemble
from ..errors import ModelError
from ..source import read_config
from ..spec import MARKS
from ..unet_names import original_layers, original_names
from ..weights import Weights
from .header import judge_sdxl, network_prefix

__all__ = ["CONFIGS", "load_unet", "original_layers"]

CONFIGS = Path(__file__).parent / "configs"
_HEAD = 64  # width of an attention head


def load_unet(weights: Weights, *, dtype: torch.dtype) -> UNet2DConditionModel:
    """The network of a file, on the CPU; tensors stored in `dtype` stay memory-mapped.

    `ModelError` if the network is not laid out as SDXL's.
    """
    judge_sdxl(weights.header)
    name = weights.header.name
    found = weights.under(network_prefix(weights.header) or "", dtype)
    tensors = {key: tensor for key, tensor in found.items() if key not in MARKS}
    try:
        sizes = unet_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except (KeyError, StopIteration, IndexError) as error:
        raise ModelError(f"the network in {name} is not laid out as SDXL's: {error}") from error
    config = read_config(CONFIGS / "unet" / "config.json") | sizes
    config["attention_head_dim"] = [max(1, w // _HEAD) for w in sizes["block_out_channels"]]
    is_original = "input_blocks.0.0.weight" in tensors
    conditions = "label_emb.0.0.weight" if is_original else "add_embedding.linear_1.weight"
    config["projection_class_embeddings_input_dim"] = tensors[conditions].shape[1]
    kind: Any = UNet2DConditionModel
    if is_original:
        with torch.device("meta"):
            ours = dict(original_names(kind.from_config(config).state_dict()))
        # names that are not known are kept, and reported when the network is filled
        tensors = {ours.get(key, key): tensor for key, tensor in tensors.items()}
    return assemble(lambda: kind.from_config(config), tensors, f"the network in {name}")
