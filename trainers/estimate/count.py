"""Count what a network costs by running it on tensors that have shapes and no memory.

Every operation of a forward and a backward pass is dispatched, autocast and checkpointing included;
its arithmetic is added up, and so is the memory alive at each moment. Two things are modelled as on
a GPU: attention by fused kernels, without the matrix of all pairs, and norms that autocast computes
in float32. `network_costs.json` holds the results for the published models; `memory.py` reads it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

DEVICE = "cpu"  # that tensors without memory are said to be on: autograd needs one that is there

Call = Callable[[nn.Module], Tensor]


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a pass through a network.

    Attributes:
        flop: operations; a multiplication with its addition is two.
        peak: bytes alive at the worst moment, besides parameters and their gradients.
    """

    flop: float
    peak: int


class Watch(TorchDispatchMode):
    """Adds up the operations, and the live storages.

    Attributes:
        known: keys of storages that do not count.
        now, peak: bytes of those that live, and the most so far.
        flop: operations.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.peak, self.flop = known, 0, 0, 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.flop += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """Attention as a fused kernel: it keeps its inputs, its output and one number per query."""

    flop = 0.0

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        _Attention.flop += _pairs(q, k)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        _Attention.flop += 2.5 * _pairs(q, k)  # five products for the two of the forward pass
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _pairs(q: Tensor, k: Tensor) -> float:
    return 4.0 * q.numel() * k.shape[-2]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    inputs = (query, key, value)
    if torch.is_autocast_enabled(DEVICE):
        inputs = (tensor.to(torch.get_autocast_dtype(DEVICE)) for tensor in inputs)
    output: Any = _Attention.apply(*inputs)
    return output


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Create tensors without memory within it, and count operations as a GPU would run them."""
    functions: Any = nn.functional
    norms = {name: _in_float32(getattr(functions, name)) for name in ("layer_norm", "group_norm")}
    own = {"scaled_dot_product_attention": _attention, **norms}
    originals = {name: getattr(functions, name) for name in own}
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            for name, function in own.items():
                setattr(functions, name, function)
            yield
        finally:
            for name, function in originals.items():
                setattr(functions, name, function)


def _in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapped(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled(DEVICE):
            return norm(x, *args, **kwargs)
        others = (a.float() if isinstance(a, Tensor) else a for a in args)
        named = {k: a.float() if isinstance(a, Tensor) else a for k, a in kwargs.items()}
        return norm(x.float(), *others, **named)

    return wrapped


def without_memory(network: nn.Module) -> nn.Module:
    """Materialise a network from torch's "meta" device, in place; inside `shapes_alone`."""
    for module in network.modules():
        for name, tensor in module.named_parameters(recurse=False):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            setattr(module, name, nn.Parameter(empty, requires_grad=tensor.requires_grad))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(tensor.shape, dtype=tensor.dtype))
    return network


def cost(network: nn.Module, call: Call, dtype: torch.dtype, *, backward: bool) -> Cost:
    """Count a pass, inside `shapes_alone`.

    Args:
        network: without memory.
        call: runs it on inputs without memory and returns its output.
        backward: also run the backward pass; without it there are no gradients.
    """
    known = {p.untyped_storage()._cdata for p in (*network.parameters(), *network.buffers())}
    for parameter in network.parameters():  # gradients are told apart from activations
        if backward and parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
            known.add(parameter.grad.untyped_storage()._cdata)
    watch, _Attention.flop = Watch(known), 0.0
    with watch, torch.set_grad_enabled(backward):
        is_mixed = dtype != torch.float32
        with torch.autocast(DEVICE, dtype if is_mixed else None, enabled=is_mixed):
            out = call(network)
        if backward:
            out.float().sum().backward()
    for parameter in network.parameters():
        parameter.grad = None
    return Cost(watch.flop + _Attention.flop, watch.peak)
