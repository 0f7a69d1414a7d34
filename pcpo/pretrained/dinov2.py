"""DINOv2's vision transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

OFFSET = 0.1
"""Patches that the authors add to a side before they divide it by that of the trained positions."""

Tokens = Float[Tensor, "b t d"]


@dataclass(frozen=True, slots=True)
class DinoSpec:
    """A DINOv2 without registers.

    Attributes:
        width: of a token.
        inner: width between the two maps of a perceptron.
        grid: patches on a side that there are positions for.
        patch: side of a patch in pixels.
    """

    width: int
    layers: int
    heads: int
    inner: int
    grid: int = 37
    patch: int = 14


SPECS = {"dinov2_large": DinoSpec(1024, 24, 16, 4096)}


class _Attention(nn.Module):
    def __init__(self, spec: DinoSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(spec.width, spec.width))

    def forward(self, x: Tokens) -> Tokens:
        parts = [
            self.get_submodule(f"{part}_proj")(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in "qkv"
        ]
        seen = functional.scaled_dot_product_attention(*parts)
        return self.get_submodule("o_proj")(seen.transpose(1, 2).flatten(2))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tokens) -> Tokens:
        return x * self.lambda1


class _Perceptron(nn.Module):
    def __init__(self, spec: DinoSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.width, spec.inner)
        self.fc2 = nn.Linear(spec.inner, spec.width)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(functional.gelu(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, spec: DinoSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=1e-6)
        self.attention = _Attention(spec)
        self.layer_scale1 = _Scale(spec.width)
        self.norm2 = nn.LayerNorm(spec.width, eps=1e-6)
        self.mlp = _Perceptron(spec)
        self.layer_scale2 = _Scale(spec.width)

    def forward(self, x: Tokens) -> Tokens:
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class _Embeddings(nn.Module):
    def __init__(self, spec: DinoSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, spec.grid**2 + 1, spec.width))
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Conv2d(3, spec.width, spec.patch, spec.patch)

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> Tokens:
        patches = self.patch_embeddings.get_submodule("projection")(pixels)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), tokens], 1)
        return tokens + self.positions(patches.shape[-1])

    def positions(self, side: int) -> Float[Tensor, "1 t d"]:
        """Positions for `side` patches on a side."""
        if side == self.grid:
            return self.position_embeddings
        first, grid = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid = grid.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        factor = (side + OFFSET) / self.grid
        grid = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], 1)


class VisionTransformer(nn.Module):
    """The network, with the names of its weights in transformers 5."""

    def __init__(self, spec: DinoSpec) -> None:
        super().__init__()
        self.embeddings = _Embeddings(spec)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(_Layer(spec) for _ in range(spec.layers))
        self.layernorm = nn.LayerNorm(spec.width, eps=1e-6)

    def forward(self, pixels: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b d"]:
        """The first token of each image, after the last norm."""
        x = self.embeddings(pixels)
        for layer in self.encoder.get_submodule("layer").children():
            x = layer(x)
        return self.layernorm(x[:, 0])
