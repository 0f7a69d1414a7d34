"""Small networks of metrics and their weight files: equal wherever they are made.

`golden/make_dinov2.py` imports this without this package: so only numpy and torch here.
"""

from __future__ import annotations

import re
from pathlib import Path

import rewards_fixture as fixture
import torch

DINO = {"width": 48, "layers": 2, "heads": 4, "inner": 192, "grid": 37, "patch": 14}


def dino_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes as DINOv2's authors have them, written down by hand."""
    width, inner = DINO["width"], DINO["inner"]
    found = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, DINO["grid"] ** 2 + 1, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, DINO["patch"], DINO["patch"]),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(DINO["layers"]):
        layer = f"blocks.{i}"
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", inner, width),
            ("mlp.fc2", width, inner),
        ):
            found |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            found[f"{layer}.{name}"] = (width,)
        found |= {f"{layer}.ls1.gamma": (width,), f"{layer}.ls2.gamma": (width,)}
    return found | {"norm.weight": (width,), "norm.bias": (width,)}


def dino_state() -> dict[str, torch.Tensor]:
    """Weights whose output depends on everything: positions of waves, scales near 1."""
    state = fixture.weights(dino_shapes(), "dino")
    for name in state:
        if name.endswith("gamma"):
            state[name] += 1
    return state | {"pos_embed": 2 * fixture.numbers("pos_embed", dino_shapes()["pos_embed"])}


def as_transformers(state: dict[str, torch.Tensor], old: bool) -> dict[str, torch.Tensor]:
    """The names of transformers 5, or those before."""
    found = {}
    for name, tensor in state.items():
        for pattern, theirs in (
            (r"^cls_token|^mask_token", r"embeddings.\g<0>"),
            (r"^pos_embed", "embeddings.position_embeddings"),
            (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
            (r"^blocks", "encoder.layer"),
            (r"^norm\.", "layernorm."),
            (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
            (r"attn\.proj", "attention.output.dense" if old else "attention.o_proj"),
        ):
            name = re.sub(pattern, theirs, name)
        if "attn.qkv" in name:
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs = f"attention.attention.{part}" if old else f"attention.{part[0]}_proj"
                found[name.replace("attn.qkv", theirs)] = third.clone()
        else:
            found[name] = tensor
    return found


def inception_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight that keeps Inception's activations near 1."""
    if name.endswith("running_var"):
        return 0.5 + fixture.numbers(name, shape).abs()
    found = fixture.weight(name, shape)
    return 1.4 * found if len(shape) == 4 else found


def write_torch(state: dict[str, torch.Tensor], path: Path) -> Path:
    """A file of torch's own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path
