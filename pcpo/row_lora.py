"""LoRAs of several versions of a network in one batch, each on its own rows.

A layer's output is linear in its weight, so the change that a LoRA makes can be added to the output
as up(down(x)). The LoRAs of all versions on one layer are stacked, with ranks padded by zeros: they
then cost two batched matrix products together, however many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Variant = int | None
"""A version of the network by its number; None is the base."""


class Stretch(NamedTuple):
    """Neighbouring rows of a batch whose owners are all in a stack.

    Attributes:
        slots: places in the stack, one for each equal part of the rows.
        first: chunk of the batch at which the rows begin.
        chunks: of each part.
    """

    slots: tuple[int, ...]
    first: int
    chunks: int


@lru_cache(maxsize=256)
def stretches(owners: tuple[Variant, ...], variants: tuple[Variant, ...]) -> tuple[Stretch, ...]:
    """The rows of a batch that a stack is for.

    Args:
        owners: of each chunk of the batch.
        variants: in the stack, in its order.

    Returns:
        The longest stretches; neighbouring chunks of one owner are one part if that fits.

    >>> stretches((1, 1, 0, 0, None, None), (1, 0))
    (Stretch(slots=(0, 1), first=0, chunks=2),)
    >>> stretches((0, None, 0, 1), (0, 1))
    (Stretch(slots=(0,), first=0, chunks=1), Stretch(slots=(0, 1), first=2, chunks=1))
    """
    place, found, first = {variant: i for i, variant in enumerate(variants)}, [], 0
    for is_in, group in groupby(owners, key=place.__contains__):
        part = list(group)
        if is_in:
            step = gcd(*(len(list(same)) for _, same in groupby(part)))
            found.append(Stretch(tuple(place[owner] for owner in part[::step]), first, step))
        first += len(part)
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Batch:
    """The owners of a batch's rows.

    Attributes:
        owners: of each chunk, in their order.
        size: rows of a chunk.
    """

    owners: tuple[Variant, ...]
    size: int

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.owners) * self.size

    def holds(self, variants: tuple[Variant, ...]) -> bool:
        """Whether the batch has rows of any of the versions."""
        return bool(stretches(self.owners, variants))

    def rows(self, variant: Variant) -> list[slice]:
        """A version's rows; neighbouring chunks are one slice."""
        parts = stretches(self.owners, (variant,))
        return [self._slice(first, len(slots) * chunks) for slots, first, chunks in parts]

    def parts(self, variants: tuple[Variant, ...]) -> list[tuple[tuple[int, ...], slice]]:
        """Slots of a stack, and the rows that equal parts of them belong to."""
        parts = stretches(self.owners, variants)
        return [(s, self._slice(first, len(s) * chunks)) for s, first, chunks in parts]

    def _slice(self, first: int, chunks: int) -> slice:
        return slice(first * self.size, (first + chunks) * self.size)


@dataclass(slots=True)
class InTurn:
    """Layers that look up, in a forward pass, the owners of their rows.

    Attributes:
        batch: in the network now; None outside a forward pass.
    """

    batch: Batch | None = field(default=None, init=False)

    @contextmanager
    def on(self, batch: Batch) -> Iterator[None]:
        """Set the network's batch within it."""
        self.batch = batch
        try:
            yield
        finally:
            self.batch = None


@dataclass(frozen=True, slots=True)
class LowRank:
    """A LoRA's addition to one layer.

    Attributes:
        variant: its version.
        up: (out, rank), of any number of trailing 1s.
        down: (rank, in), or a convolution's (rank, in, height, width).
        scale: strength times alpha / rank.
        first: index of its first output among the layer's, 0 except for fused layers.
        count: how many of the layer's outputs it has; None for all.
    """

    variant: Variant
    up: Tensor
    down: Tensor
    scale: float
    first: int = 0
    count: int | None = None


@dataclass(frozen=True, slots=True)
class StackedLora:
    """The additions of several versions' LoRAs to the same outputs of one layer.

    Attributes:
        variants: their versions, in the order of the stack.
        up: including the scale.
        down: of a convolution with height and width.
        first: index of the first output among the layer's.
    """

    variants: tuple[Variant, ...]
    up: Float[Tensor, "v out r"]
    down: Float[Tensor, "v r *in"]
    first: int

    @classmethod
    def of(cls, layer: nn.Module, additions: Sequence[LowRank]) -> StackedLora:
        """Stack LoRAs; a version may have several.

        Args:
            layer: linear, or a 2D convolution.
            additions: at least one, all to the same outputs.

        Returns:
            The stack, in float32 at least: a file's dtype cannot hold a product with the scale.
        """
        inner = (layer.in_channels, *layer.kernel_size) if isinstance(layer, nn.Conv2d) else (-1,)
        ups: dict[Variant, list[Tensor]] = {}
        downs: dict[Variant, list[Tensor]] = {}
        for one in additions:
            ups.setdefault(one.variant, []).append(_wide(one.up).flatten(1) * one.scale)
            downs.setdefault(one.variant, []).append(_wide(one.down).flatten(1))
        down = _stack_padded([torch.cat(parts) for parts in downs.values()])
        up = _stack_padded([torch.cat(parts, 1).T for parts in ups.values()]).mT
        return cls(tuple(ups), up, down.unflatten(2, inner), additions[0].first)

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors."""
        return [self.up, self.down]

    def like(self, x: Tensor) -> StackedLora:
        """The same on the device of x, in its dtype."""
        return replace(self, up=self.up.to(x), down=self.down.to(x))

    def __call__(self, layer: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        """Add to a layer's output, in place.

        Args:
            layer: to add to.
            x: its input.
            y: its output, changed.
            batch: the owners of the rows.
        """
        for slots, rows in batch.parts(self.variants):
            up, down = (_select_slots(stack, slots).to(x) for stack in self.tensors)
            if isinstance(layer, nn.Conv2d):
                _add_convolution(layer, x[rows], y[rows], up, down)
            else:
                _add_linear(x[rows], y[rows], up, down, self.first)


def stored_in(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Convert a LoRA file's weights to a dtype; alphas, which scale them, stay exact.

    >>> found = stored_in({"x.alpha": torch.tensor(0.3), "x.up": torch.ones(1)}, torch.bfloat16)
    >>> [tensor.dtype for tensor in found.values()]
    [torch.float32, torch.bfloat16]
    """
    return {k: t if k.endswith(".alpha") else t.to(dtype) for k, t in tensors.items()}


def _wide(part: Tensor) -> Tensor:
    return part if part.dtype == torch.float64 else part.float()


def _stack_padded(parts: list[Tensor]) -> Tensor:
    """Stack (rank, n) tensors, padded with zeros to the highest rank."""
    rank = max(len(part) for part in parts)
    return torch.stack([F.pad(part, (0, 0, 0, rank - len(part))) for part in parts])


def _select_slots(stack: Tensor, slots: tuple[int, ...]) -> Tensor:
    """Select from a stack, without a copy if the slots are neighbours."""
    first, count = slots[0], len(slots)
    if slots == tuple(range(first, first + count)):
        return stack[first : first + count]
    return torch.stack([stack[slot] for slot in slots])


def _add_linear(x: Tensor, y: Tensor, up: Tensor, down: Tensor, first: int) -> None:
    inner = x.reshape(len(down), -1, x.shape[-1]) @ down.mT
    if y.is_contiguous() and y.dtype == x.dtype:
        whole = y.view(len(up), -1, y.shape[-1])
        whole.narrow(-1, first, up.shape[1]).baddbmm_(inner, up.mT)
    else:
        added = (inner @ up.mT).view(*y.shape[:-1], -1)
        y.narrow(-1, first, up.shape[1]).add_(added)


def _add_convolution(layer: nn.Conv2d, x: Tensor, y: Tensor, up: Tensor, down: Tensor) -> None:
    """Compute parts of the rows side by side in one grouped convolution."""
    padding: Any = layer.padding
    count, how = len(down), (layer.stride, padding, layer.dilation)
    beside = x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
    inner = F.conv2d(beside, down.flatten(0, 1), None, *how, count)
    inner = inner.unflatten(1, (count, -1)).transpose(0, 1).flatten(0, 1).flatten(2)
    ups = up.repeat_interleave(len(x) // count, 0)
    if y.is_contiguous() and y.dtype == x.dtype:
        y.flatten(2).baddbmm_(ups, inner)
    else:
        y.add_((ups @ inner).view(*y.shape))
