"""LPIPS's networks: AlexNet or VGG-16, and the linear heads on their layers."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class TrunkSpec:
    """The convolutions of a classifier, as torchvision numbers its layers.

    Attributes:
        convolutions: number in `features`, inputs, outputs, kernel, stride, border.
        pools: numbers in `features` of the pools.
        pool: kernel of the pools; their stride is 2.
        taps: numbers in `features` of the convolutions after whose rectifiers images are compared.
    """

    convolutions: tuple[tuple[int, int, int, int, int, int], ...]
    pools: tuple[int, ...]
    pool: int
    taps: tuple[int, ...]

    @property
    def widths(self) -> list[int]:
        """Channels where images are compared."""
        return [outputs for at, _, outputs, *_ in self.convolutions if at in self.taps]


def _vgg(*widths: int) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """VGG16's convolutions, each with a rectifier after it; 0 is a pool."""
    convolutions, at, before = [], 0, 3
    for width in widths:
        if width:
            convolutions.append((at, before, width, 3, 1, 1))
            before = width
        at += 2 if width else 1
    return tuple(convolutions)


TRUNKS = {
    "alexnet": TrunkSpec(
        (
            (0, 3, 64, 11, 4, 2),
            (3, 64, 192, 5, 1, 2),
            (6, 192, 384, 3, 1, 1),
            (8, 384, 256, 3, 1, 1),
            (10, 256, 256, 3, 1, 1),
        ),
        pools=(2, 5),
        pool=3,
        taps=(0, 3, 6, 8, 10),
    ),
    "vgg16": TrunkSpec(
        _vgg(64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
        pools=(4, 9, 16, 23),
        pool=2,
        taps=(2, 7, 14, 21, 28),
    ),
}
NETS = {"alex": "alexnet", "vgg": "vgg16"}


class Trunk(nn.Module):
    """The convolutions, with the names of their weights in torchvision."""

    def __init__(self, spec: TrunkSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = nn.Module()
        for at, inputs, outputs, kernel, stride, border in spec.convolutions:
            conv = nn.Conv2d(inputs, outputs, kernel, stride, border)
            self.features.add_module(str(at), conv)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c i j"]]:
        """The features at which images are compared."""
        features = []
        for at, *_ in self.spec.convolutions:
            if at - 1 in self.spec.pools:
                x = functional.max_pool2d(x, self.spec.pool, 2)
            x = functional.relu(self.features.get_submodule(str(at))(x))
            if at in self.spec.taps:
                features.append(x)
        return features


class Heads(nn.Module):
    """The channels' weights, with their names in the `lpips` package."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        for i, width in enumerate(widths):
            layer = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.ModuleDict({"1": layer})}))

    def roots(self) -> list[Float[Tensor, "c 1 1"]]:
        """The square root of each weight, by layer."""
        return [weight[0].sqrt() for weight in self.parameters()]
