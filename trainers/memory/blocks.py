"""Frozen blocks that wait in main memory: each is on the device only while it runs.

Two buffers of the device take turns, every block having its own one. While a block runs, the next
is copied into the other buffer by a stream of its own; a CPU copies too, without a stream. Blocks
go from main memory to the device alone, since nothing changes them. Numbers, kernels and their
order are those of a network that stays on the device, so that results are the same bytes.

The order of blocks is learned while they run: forward, backward, and again where gradient
checkpointing recomputes them. A wrong guess costs time and no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..families.registry import FAMILIES

LAYERS = ("Qwen3DecoderLayer", "T5Block")
"""Classes of the layers of large text encoders."""

ALIGNMENT = 256
"""Bytes; every tensor begins at a multiple of it, as allocators have it."""


def swap_blocks(network: nn.Module, device: torch.device) -> BlockSwap | None:
    """Have a network's repeated blocks wait in main memory; its other weights are left alone.

    The adapters must be in place already: what is trained stays on the device.

    Returns:
        What swaps them, which their hooks keep alive; None if the network has no such blocks.
    """
    return _swap(network, {name for spec in FAMILIES.values() for name in spec.blocks}, device)


def swap_encoders(family: Any, device: torch.device) -> None:
    """Have the layers of a model's large text encoders wait in main memory."""
    for module in family.text_modules:
        _swap(module, {*LAYERS}, device)


def _swap(network: nn.Module, kinds: set[str], device: torch.device) -> BlockSwap | None:
    blocks = [module for module in network.modules() if type(module).__name__ in kinds]
    return BlockSwap(blocks, device) if blocks else None


class BlockSwap:
    """Swaps blocks; their frozen parameters are views of two buffers from now on.

    Args:
        blocks: in the order in which they usually run.
    """

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        frozen = [[p for p in block.parameters() if not p.requires_grad] for block in blocks]
        self._hosts = [_host_copy(parameters, self._stream is not None) for parameters in frozen]
        size = max(len(host) for host in self._hosts)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._held: list[int | None] = [None, None]
        self._arrivals: list[Any] = [None, None]
        self._way: tuple[int | None, int | None] = (None, None)  # the last two blocks
        self._next: dict[tuple[int | None, int | None], int] = {}
        for place, (block, parameters) in enumerate(zip(blocks, frozen, strict=True)):
            for parameter, view in zip(parameters, self._views(place, parameters), strict=True):
                parameter.data = view
            block.register_forward_pre_hook(lambda *_, place=place: self.bring(place))
            block.register_forward_hook(lambda *given, place=place: self._watch(given[-1], place))

    @property
    def device_bytes(self) -> int:
        """Of both buffers."""
        return sum(len(buffer) for buffer in self._buffers)

    def bring(self, place: int) -> None:
        """Have a block on the device, and begin to copy the one that is likely to be next."""
        buffer = place % 2
        if self._held[buffer] != place:
            self._copy(place)
        if self._stream is not None and self._arrivals[buffer] is not None:
            torch.cuda.current_stream().wait_event(self._arrivals[buffer])
            self._arrivals[buffer] = None
        if self._way[1] != place:
            self._next[self._way] = place
            self._way = (self._way[1], place)
        guess = self._next.get(self._way)
        if guess is not None and guess % 2 != buffer and self._held[guess % 2] != guess:
            self._copy(guess, is_ahead=True)

    def _copy(self, place: int, *, is_ahead: bool = False) -> None:
        host, buffer = self._hosts[place], place % 2
        target = self._buffers[buffer][: len(host)]
        self._held[buffer] = place
        if self._stream is None:
            target.copy_(host)
            return
        present = torch.cuda.current_stream()
        if not is_ahead:
            present.wait_stream(self._stream)
            target.copy_(host, non_blocking=True)
            self._arrivals[buffer] = None
            return
        self._stream.wait_stream(present)  # the block that was there may still be running
        with torch.cuda.stream(self._stream):
            target.copy_(host, non_blocking=True)
            self._arrivals[buffer] = self._stream.record_event()

    def _watch(self, output: Any, place: int) -> None:
        """Bring the block again before its backward pass."""
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _: self.bring(place))

    def _views(self, place: int, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        buffer = self._buffers[place % 2]
        for parameter, (start, _) in zip(parameters, _places(parameters), strict=True):
            own = buffer[start : start + parameter.data.nbytes]
            yield own.view(parameter.dtype).view(parameter.shape)


def _places(parameters: list[nn.Parameter]) -> list[tuple[int, int]]:
    """Where each begins and the next may begin, in bytes."""
    sizes = (-(-p.data.nbytes // ALIGNMENT) * ALIGNMENT for p in parameters)
    return [*pairwise(accumulate(sizes, initial=0))]


def _host_copy(parameters: list[nn.Parameter], is_pinned: bool) -> Tensor:
    """The bytes of parameters in main memory."""
    places = _places(parameters)
    size = places[-1][1] if places else 0
    host = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned)
    for parameter, (start, _) in zip(parameters, places, strict=True):
        flat = parameter.data.detach().contiguous().flatten().view(torch.uint8)
        host[start : start + len(flat)] = flat.cpu()
    return host
