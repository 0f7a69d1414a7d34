"""What a tuned version of a network adds to the output of one layer, for some rows of a batch.

A layer's output is linear in its parameters. So whatever a version changes of them can be added to
the output instead: LoRAs all together, by `StackedLora`; anything else (LoKr, LoHa, DoRA, whole
weights) as the layer's own operation with the difference of the parameters. No ComfyUI is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...pcpo.row_lora import Batch, LowRank, StackedLora, Variant


@dataclass(frozen=True, slots=True)
class Difference:
    """What other parameters add to one layer.

    Attributes:
        variant: whose they are.
        weight: its weight less the layer's; None where they are equal.
        bias: the same of the bias.
    """

    variant: Variant
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Whose it is."""
        return (self.variant,)

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds."""
        return [tensor for tensor in (self.weight, self.bias) if tensor is not None]

    def like(self, x: Tensor) -> Difference:
        """The same on the device of x, in its dtype."""
        weight, bias = (t if t is None else t.to(x) for t in (self.weight, self.bias))
        return Difference(self.variant, weight, bias)

    def __call__(self, layer: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        """Add to the version's rows of the layer's output, in place.

        Args:
            layer: whose it is.
            batch: whose rows they are.
        """
        one = self.like(x)
        for rows in batch.rows(self.variant):
            one._add(layer, x[rows], y[rows])

    def _add(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if self.weight is not None:
            y.add_(affine(layer, x, self.weight, self.bias))
        elif self.bias is not None:
            has_channels_first = isinstance(layer, nn.Conv2d | nn.GroupNorm)
            y.add_(self.bias.view(-1, *[1] * (y.ndim - 2)) if has_channels_first else self.bias)


Addition = StackedLora | Difference


def affine(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer's output with other parameters, which it is linear in.

    Args:
        layer: for which `is_affine` holds.
    """
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        return F.conv2d(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.GroupNorm):
        return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    return F.linear(x, weight, bias)


def is_linear(layer: nn.Module) -> bool:
    """Whether it is y = x W^T + b; ComfyUI's quantised layers are no subclass of torch's."""
    return hasattr(layer, "in_features") and hasattr(layer, "out_features")


def is_affine(layer: nn.Module) -> bool:
    """Whether `affine` knows the layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros"
    return isinstance(layer, nn.GroupNorm | nn.LayerNorm) or is_linear(layer)


def low_rank(variant: Variant, layer: nn.Module, patch: Sequence[Any]) -> LowRank | None:
    """A patch as an addition to its layer's output.

    Args:
        variant: whose it is.
        layer: the module whose weight it is for.
        patch: of a ModelPatcher: strength, adapter, strength of the weight, offset, function.

    Returns:
        The addition; None where the patch is no plain LoRA that fits a linear or 2D layer.
    """
    strength, adapter, weight_strength, offset, function = patch
    weights = getattr(adapter, "weights", None)
    if getattr(adapter, "name", None) != "lora" or weights is None or weight_strength != 1:
        return None
    up, down, alpha, *special = weights  # of LoCon, DoRA and layers of another size
    if any(one is not None for one in special):
        return None
    if function is not None:
        up = function(up.float())  # which moves rows about
    first, count = (0, None) if offset is None else (offset[1], offset[2])
    if not _fits(layer, up, down, offset):
        return None
    scale = strength * (1.0 if alpha is None else alpha / len(down))
    return LowRank(variant, up, down, float(scale), first, count)


def resizes(patch: Sequence[Any]) -> bool:
    """Whether a patch of a ModelPatcher gives its weight another shape."""
    adapter = patch[1]
    if getattr(adapter, "name", None) == "lora":
        return adapter.weights[-1] is not None
    is_named = isinstance(adapter, tuple) and len(adapter) == 2 and adapter[0] == "diff"
    return is_named and len(adapter[1]) > 1 and bool(adapter[1][1].get("pad_weight"))


def _fits(layer: nn.Module, up: Tensor, down: Tensor, offset: Sequence[int] | None) -> bool:
    """Whether up and down make a weight of the layer, or of that part of its outputs."""
    if isinstance(layer, nn.Conv2d):
        shape = (
            layer.out_channels,
            layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1],
        )
        is_known = layer.groups == 1 and layer.padding_mode == "zeros" and offset is None
    elif is_linear(layer):
        shape = (layer.out_features if offset is None else offset[2], layer.in_features)
        is_known = offset is None or offset[0] == 0
    else:
        return False
    return is_known and (len(up), down[0].numel()) == shape and up[0].numel() == len(down)
