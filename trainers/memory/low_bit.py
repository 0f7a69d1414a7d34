"""The frozen base in fewer bits: fp8, int8 or nf4 weights below float32 adapters.

A linear layer keeps codes and scales. Each pass through it, forward or backward, unpacks them in
the dtype that it computes in, and drops the result again, so that only one layer at a time is
unpacked. Rollout and update multiply by the same numbers with the same kernels. (diffusers'
layerwise casting also works for fp8, but leaves modulations unpacked, a quarter of FLUX, and
autograd keeps every layer's unpacked weight until the backward pass.)

Shapes: o outputs and i inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config.train_config import ConfigError
from ..families.registry import FAMILIES, titles

Kind = Literal["fp8", "int8", "nf4"]

_FP8 = torch.float8_e4m3fn
_BLOCK = 64  # weights that share a scale in nf4
_BLOCKS = tuple({start: None for spec in FAMILIES.values() for start in spec.packed})


def pack_base(network: nn.Module, kind: Kind, device: torch.device, *, waits: bool = False) -> int:
    """Pack the weights of a flow network's blocks; adapters, norms and embedders stay.

    Args:
        network: with adapters or without; changed in place.
        device: where they are made and stay, layer by layer: the whole never has to fit there.
        waits: whether they go back to main memory.

    Returns:
        The number of packed layers.

    Raises:
        ConfigError: if the network has no such blocks.
    """
    chosen = [name for name, module in network.named_modules() if is_packable(name, module)]
    if not chosen:
        raise ConfigError(
            f"model.base is {kind!r}, which is for {titles('base')}; set it to 'same'"
        )
    for name in chosen:
        owner, _, last = name.rpartition(".")
        layer: Any = network.get_submodule(name)
        packed = PackedLinear(layer, kind, device)
        setattr(network.get_submodule(owner), last, packed.to("cpu") if waits else packed)
    return len(chosen)


def is_packable(name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer of a flow network's blocks, and no adapter."""
    is_adapter = ".lora_A." in name or ".lora_B." in name
    return isinstance(module, nn.Linear) and name.startswith(_BLOCKS) and not is_adapter


class PackedLinear(nn.Module):
    """A frozen linear layer whose weight is kept as codes.

    Args:
        layer: the layer; its bias is kept as it is.
        device: where they are made and stay.
    """

    def __init__(self, layer: nn.Linear, kind: Kind, device: torch.device) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.kind: Kind = kind
        codes, scale = _PACK[kind](layer.weight.detach().to(device))
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        bias = None if layer.bias is None else layer.bias.detach().to(device)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """The layer's output, in the dtype of the input or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Product.apply(x, self.weight, self.scale, self.bias, self.unpack)

    def unpack(self, dtype: torch.dtype) -> Float[Tensor, "o i"]:
        """The unpacked weight."""
        return _UNPACK[self.kind](self, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kind}"


class _Product(torch.autograd.Function):
    """x W^T + b, with the gradient of x alone; the backward pass unpacks the weight again."""

    @staticmethod
    def forward(
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        whole: Callable[[torch.dtype], Tensor],
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        return nn.functional.linear(x, whole(x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.whole = inputs[-1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad @ ctx.whole(grad.dtype), None, None, None, None


# --- the codes -----------------------------------------------------------------------------------


def _pack_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 with a power of two for each row: weights that a file stores as plain fp8 stay exact."""
    largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=2.0**-100)
    scale = torch.exp2((largest / torch.finfo(_FP8).max).log2().ceil())
    return (weight.float() / scale).to(_FP8), scale.to(weight.dtype)


def _pack_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """-127 to 127 with a scale for each row, rounded up to the weight's dtype first."""
    largest = weight.float().abs().amax(dim=1, keepdim=True).clamp(min=2.0**-100)
    scale = (largest / 127 * (1 + torch.finfo(weight.dtype).eps)).to(weight.dtype)
    return (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def _unpack_rows(layer: PackedLinear, dtype: torch.dtype) -> Tensor:
    return layer.weight.to(dtype) * layer.scale.to(dtype)


def _pack_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """bitsandbytes' normal float of 4 bits, with a scale for each 64 weights."""
    from bitsandbytes import functional

    kind = {"blocksize": _BLOCK, "compress_statistics": False, "quant_type": "nf4"}
    codes, state = functional.quantize_4bit(weight.contiguous(), **kind)
    return codes, state.absmax


def _unpack_nf4(layer: PackedLinear, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    state = functional.QuantState(
        absmax=layer.scale,
        shape=torch.Size((layer.out_features, layer.in_features)),
        code=_nf4_levels(layer.weight.device),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    return functional.dequantize_4bit(layer.weight, state)


_LEVELS: dict[torch.device, Tensor] = {}


def _nf4_levels(device: torch.device) -> Tensor:
    from bitsandbytes import functional

    if device not in _LEVELS:
        _LEVELS[device] = functional.get_4bit_type("nf4", device=device)
    return _LEVELS[device]


_PACK: dict[Kind, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "fp8": _pack_fp8,
    "int8": _pack_int8,
    "nf4": _pack_nf4,
}
_UNPACK: dict[Kind, Callable[[PackedLinear, torch.dtype], Tensor]] = {
    "fp8": _unpack_rows,
    "int8": _unpack_rows,
    "nf4": _unpack_nf4,
}
