"""Inception-v3 in the form of 2015, whose features the Fréchet Inception Distance is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

SIDE = 299
CLASSES = 1008

Maps = Float[Tensor, "b c h w"]


@dataclass(frozen=True, slots=True)
class _Conv:
    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]


_Step = _Conv | str | tuple[_Conv, _Conv]
_Block = tuple[tuple[_Step, ...], ...]

_POOLS = {
    "average": lambda x: functional.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False),
    "maximum": lambda x: functional.max_pool2d(x, 3, 1, padding=1),
    "halved": lambda x: functional.max_pool2d(x, 3, 2),
}


def _conv(
    name: str, inputs: int, outputs: int, height: int, width: int | None = None, *, stride: int = 0
) -> _Conv:
    """A convolution that keeps the size, or has a stride and no border."""
    kernel = (height, width or height)
    border = (0, 0) if stride else (kernel[0] // 2, kernel[1] // 2)
    return _Conv(name, inputs, outputs, kernel, stride or 1, border)


def _fork(name: str, ends: str, inputs: int, outputs: int) -> tuple[_Conv, _Conv]:
    across, down = (f"{name}{end}" for end in ends)
    return _conv(across, inputs, outputs, 1, 3), _conv(down, inputs, outputs, 3, 1)


def _block_a(width: int, pooled: int) -> _Block:
    return (
        (_conv("branch1x1", width, 64, 1),),
        (_conv("branch5x5_1", width, 48, 1), _conv("branch5x5_2", 48, 64, 5)),
        (
            _conv("branch3x3dbl_1", width, 64, 1),
            _conv("branch3x3dbl_2", 64, 96, 3),
            _conv("branch3x3dbl_3", 96, 96, 3),
        ),
        ("average", _conv("branch_pool", width, pooled, 1)),
    )


def _block_b(width: int) -> _Block:
    return (
        (_conv("branch3x3", width, 384, 3, stride=2),),
        (
            _conv("branch3x3dbl_1", width, 64, 1),
            _conv("branch3x3dbl_2", 64, 96, 3),
            _conv("branch3x3dbl_3", 96, 96, 3, stride=2),
        ),
        ("halved",),
    )


def _block_c(inner: int) -> _Block:
    width = 768
    return (
        (_conv("branch1x1", width, 192, 1),),
        (
            _conv("branch7x7_1", width, inner, 1),
            _conv("branch7x7_2", inner, inner, 1, 7),
            _conv("branch7x7_3", inner, 192, 7, 1),
        ),
        (
            _conv("branch7x7dbl_1", width, inner, 1),
            _conv("branch7x7dbl_2", inner, inner, 7, 1),
            _conv("branch7x7dbl_3", inner, inner, 1, 7),
            _conv("branch7x7dbl_4", inner, inner, 7, 1),
            _conv("branch7x7dbl_5", inner, 192, 1, 7),
        ),
        ("average", _conv("branch_pool", width, 192, 1)),
    )


def _block_d(width: int) -> _Block:
    return (
        (_conv("branch3x3_1", width, 192, 1), _conv("branch3x3_2", 192, 320, 3, stride=2)),
        (
            _conv("branch7x7x3_1", width, 192, 1),
            _conv("branch7x7x3_2", 192, 192, 1, 7),
            _conv("branch7x7x3_3", 192, 192, 7, 1),
            _conv("branch7x7x3_4", 192, 192, 3, stride=2),
        ),
        ("halved",),
    )


def _block_e(width: int, pool: str) -> _Block:
    return (
        (_conv("branch1x1", width, 320, 1),),
        (_conv("branch3x3_1", width, 384, 1), _fork("branch3x3_2", "ab", 384, 384)),
        (
            _conv("branch3x3dbl_1", width, 448, 1),
            _conv("branch3x3dbl_2", 448, 384, 3),
            _fork("branch3x3dbl_3", "ab", 384, 384),
        ),
        (pool, _conv("branch_pool", width, 192, 1)),
    )


_STEM: tuple[_Step, ...] = (
    _conv("Conv2d_1a_3x3", 3, 32, 3, stride=2),
    _Conv("Conv2d_2a_3x3", 32, 32, (3, 3), 1, (0, 0)),
    _conv("Conv2d_2b_3x3", 32, 64, 3),
    "halved",
    _conv("Conv2d_3b_1x1", 64, 80, 1),
    _Conv("Conv2d_4a_3x3", 80, 192, (3, 3), 1, (0, 0)),
    "halved",
)
_BLOCKS: Mapping[str, _Block] = {
    "Mixed_5b": _block_a(192, 32),
    "Mixed_5c": _block_a(256, 64),
    "Mixed_5d": _block_a(288, 64),
    "Mixed_6a": _block_b(288),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(768),
    "Mixed_7b": _block_e(1280, "average"),
    "Mixed_7c": _block_e(2048, "maximum"),
}


class _Norm(nn.Module):
    """Batch normalisation with stored statistics, all of them parameters in the weight file."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_parameter(name, nn.Parameter(torch.empty(width), requires_grad=False))

    def forward(self, x: Maps) -> Maps:
        mean, variance = self.get_parameter("running_mean"), self.get_parameter("running_var")
        weight, bias = self.get_parameter("weight"), self.get_parameter("bias")
        return functional.batch_norm(x, mean, variance, weight, bias, eps=1e-3)


class _Convolution(nn.Module):
    """A convolution, its normalisation and a rectifier."""

    def __init__(self, of: _Conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            of.inputs, of.outputs, of.kernel, of.stride, of.padding, bias=False
        ).requires_grad_(False)
        self.bn = _Norm(of.outputs)

    def forward(self, x: Maps) -> Maps:
        return functional.relu(self.bn(self.conv(x)), inplace=True)


class _Steps(nn.Module):
    """Named convolutions, applied in sequence."""

    def _make(self, steps: Iterable[_Step]) -> None:
        for step in steps:
            convs = () if isinstance(step, str) else (step,) if isinstance(step, _Conv) else step
            for conv in convs:
                self.add_module(conv.name, _Convolution(conv))

    def _take(self, x: Maps, steps: Iterable[_Step]) -> Maps:
        for step in steps:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, _Conv):
                x = self.get_submodule(step.name)(x)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in step], 1)
        return x


class _Branches(_Steps):
    """Branches over one input, their outputs joined."""

    def __init__(self, block: _Block) -> None:
        super().__init__()
        self.block = block
        for branch in block:
            self._make(branch)

    def forward(self, x: Maps) -> Maps:
        return torch.cat([self._take(x, branch) for branch in self.block], 1)


class Inception2015(_Steps):
    """The network, with the names of its weights in pytorch-fid's and torch-fidelity's file."""

    def __init__(self) -> None:
        super().__init__()
        self._make(_STEM)
        for name, block in _BLOCKS.items():
            self.add_module(name, _Branches(block))
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Float[Tensor, "b 3 s s"]) -> tuple[Tensor, Tensor]:
        """Features (b, 2048), and logits (b, 1008) without the bias of the last layer."""
        x = self._take(x, _STEM)
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T
