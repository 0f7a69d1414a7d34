"""LPIPS: how different two images look to a network, and how diverse those of a prompt are.

Source: Zhang et al. 2018, arXiv:1801.03924, version 0.1. Of unit vectors x and y over the channels
at each place of five layers, and weights w >= 0 of the channels,

    d(x, y) = sum over layers of the mean over places of sum_c w_c (x_c - y_c)^2,

which is a squared distance of what is called an embedding here, x sqrt(w / places) of all layers in
one row. So the mean over all pairs of k images is 2 / (k - 1) sum_i |e_i - e|^2, with e the mean:
no pair has to be compared, and no image kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn
from torch.nn import functional

from ..pictures.tensors import Images
from ..pretrained.clip import device_of
from ..pretrained.find import WrongWeights
from ..pretrained.preprocess import interpolated, shortest_to, sides
from .base import checked, finite
from .weighted import Weighted, exactly

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet's deviation of red, green and blue, from -1 to 1."""

SIDE = 256
"""The shorter side that an image is resized to, so that sizes can be compared."""

_AT_ONCE = 8  # images of a prompt that are embedded together

Rows = Float32[Tensor, "b n"]


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


class Spread:
    """The mean squared distance over all pairs of rows, from rows as they come.

    >>> spread = Spread()
    >>> for row in (torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])):
    ...     spread.add(row)
    >>> spread.value  # (25 + 16 + 9) / 3
    16.666666666666668
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Float64[Tensor, " n"] | None = None
        self._squares = 0.0

    def add(self, rows: Float[Tensor, "b n"]) -> None:
        """Take in rows, by Welford's recursion in float64.

        Raises:
            ValueError: if their length changed or some are not finite; none is taken in then.
        """
        if self._mean is None:
            self._mean = torch.zeros(rows.shape[1], dtype=torch.float64)
        if rows.shape[1] != len(self._mean):
            raise ValueError(
                f"rows of {rows.shape[1]} numbers came after rows of {len(self._mean)}: the images "
                "of a prompt must be of one size"
            )
        for row in finite(rows, "embeddings"):
            self.count += 1
            now = row.double()
            apart = now - self._mean
            self._mean += apart / self.count
            self._squares += float(apart @ (now - self._mean))

    @property
    def value(self) -> float:
        """The mean over pairs; `ValueError` for fewer than two rows."""
        if self.count < 2:
            raise ValueError(
                f"a diversity needs two images of a prompt, and there are {self.count}"
            )
        return 2 * self._squares / (self.count - 1)


@dataclass(frozen=True, eq=False)
class Lpips(Weighted):
    """LPIPS of version 0.1 over AlexNet or VGG16.

    Images are resized so that their shorter side is 256 pixels (linearly, with antialiasing).

    Attributes:
        weights: path of the network's weights, torchvision's; searched where None.
        folders: where files are searched first.
        net: "alex" or "vgg".
        heads: path of the channels' weights, those of the `lpips` package; searched where None.

    Raises:
        ValueError: for an option it does not have.
    """

    name: ClassVar[str] = "lpips"
    net: str = "alex"
    heads: str | None = None

    def __post_init__(self) -> None:
        if self.net not in NETS:
            raise ValueError(f"net is {self.net!r}; choose one of {', '.join(NETS)}")
        super().__post_init__()

    @property
    def files(self) -> Mapping[str, str | None]:
        return {f"lpips_{self.net}": self.heads, NETS[self.net]: self.weights}

    @property
    def preparation(self) -> str:
        return f"shortest-{SIDE}-bilinear-antialias"

    @cached_property
    def _trunk(self) -> nn.Module:
        key = NETS[self.net]
        return self.network(key, lambda: Trunk(TRUNKS[key]))

    @cached_property
    def _heads(self) -> Heads:
        """The channels' weights; `WrongWeights` if one is negative."""
        key = f"lpips_{self.net}"
        heads = self.network(key, lambda: Heads(TRUNKS[NETS[self.net]].widths))
        assert isinstance(heads, Heads)
        if any(bool((weight < 0).any()) for weight in heads.parameters()):
            raise WrongWeights(f"{self.paths[key]} has negative weights, which LPIPS's are not")
        return heads

    def modules(self) -> list[nn.Module]:
        return [self._trunk, self._heads]

    def embed(self, images: Images) -> Rows:
        """Rows on the CPU whose squared distances are LPIPS.

        Their length depends on the images' shape; all images have one size.
        """
        device = device_of(self._trunk)
        with exactly(device):
            pixels = checked(images).to(device).float() / 127.5 - 1
            pixels = interpolated(pixels, *shortest_to(*sides(pixels), SIDE), "bilinear")
            shift, scale = (pixels.new_tensor(c).view(3, 1, 1) for c in (SHIFT, SCALE))
            layers, rows = self._trunk((pixels - shift) / scale), []
            for x, root in zip(layers, self._heads.roots(), strict=True):
                x = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
                rows.append((x * root).flatten(1) / x[0, 0].numel() ** 0.5)
            return torch.cat(rows, 1).cpu()

    def distance(self, one: Images, other: Images) -> Float32[Tensor, " b"]:
        """LPIPS of each image of `one` and its counterpart in `other`.

        >= 0, mostly below 1; 0 for equal images. `ValueError` if the sizes differ.
        """
        if one.shape != other.shape:
            raise ValueError(
                f"images of shapes {tuple(one.shape)} and {tuple(other.shape)} cannot be compared "
                "one with the other; compare images of one size"
            )
        return (self.embed(one) - self.embed(other)).square().sum(1)

    def diversity(self, images: Images) -> float:
        """The mean LPIPS over all pairs of images (two at least) of one prompt: >= 0, mostly below
        1.
        """
        spread = Spread()
        for part in images.split(_AT_ONCE):
            spread.add(self.embed(part))
        return spread.value
