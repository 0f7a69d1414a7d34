"""Sizes of a checkpoint's modules, read from the shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]


def _count(shapes: Shapes, pattern: str) -> int:
    """Count the indices, from 0, at the pattern's group at the start of a name."""
    indices = {int(m[1]) for key in shapes if (m := re.match(pattern, key))}
    return max(indices) + 1 if indices else 0


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """Fields of diffusers' config that differ between the UNets of SD1.x and SDXL.

    A level ends with a downsampling, and its blocks give its width and the depth of its
    transformers; all levels have as many blocks. Names are those of the original code, or those of
    diffusers.
    """
    original = "input_blocks.0.0.weight" in shapes
    levels = _levels(shapes) if original else _levels_of_diffusers(shapes)
    if any(len(level) != len(levels[0]) or len(set(level)) != 1 for level in levels):
        raise ModelError(f"the network's levels are not alike, as SD1.x's and SDXL's are: {levels}")
    widths, depths = zip(*(level[0] for level in levels), strict=True)
    context = next(s[1] for key, s in shapes.items() if key.endswith("attn2.to_k.weight"))
    entry = "middle_block.1.proj_in.weight" if original else "mid_block.attentions.0.proj_in.weight"
    deep = {"transformer_layers_per_block": [max(1, depth) for depth in depths]}
    return {
        **(deep if max(depths) > 1 else {}),
        "block_out_channels": list(widths),
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in depths[::-1]],
        "cross_attention_dim": context,
        "use_linear_projection": len(shapes[entry]) == 2,
    }


def _levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    levels: list[list[tuple[int, int]]] = [[]]
    for i in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
            continue
        width = shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0]
        depth = _count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.")
        levels[-1].append((width, depth))
    return levels


def _levels_of_diffusers(shapes: Shapes) -> list[list[tuple[int, int]]]:
    levels = []
    for i in range(_count(shapes, r"down_blocks\.(\d+)\.")):
        block = rf"down_blocks\.{i}\."
        blocks = range(_count(shapes, rf"{block}resnets\.(\d+)\."))
        depths = [
            _count(shapes, rf"{block}attentions\.{j}\.transformer_blocks\.(\d+)\.") for j in blocks
        ]
        widths = [shapes[f"down_blocks.{i}.resnets.{j}.conv2.weight"][0] for j in blocks]
        levels.append(list(zip(widths, depths, strict=True)))
    return levels


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Fields of diffusers' config that differ between VAEs, from the original code's names."""
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    if not levels:
        raise ModelError("the VAE has no encoder: choose a whole checkpoint")
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    return {
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }


def text_config(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a CLIP text encoder, whose heads are 64 wide; names are transformers 5's."""
    try:
        vocabulary, hidden = shapes["embeddings.token_embedding.weight"]
        positions = shapes["embeddings.position_embedding.weight"][0]
        intermediate = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except KeyError as error:
        raise ModelError(f"the text encoder lacks {error}: choose a whole checkpoint") from error
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "max_position_embeddings": positions,
        "intermediate_size": intermediate,
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(1, hidden // 64),
    }
