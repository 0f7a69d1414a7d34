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

from ..pictures.tensors import Images
from ..pretrained.find import WrongWeights
from ..pretrained.lpips_net import NETS, TAPS, Heads, Trunk
from ..pretrained.network import device_of
from ..pretrained.preprocess import interpolate, shortest_to, sides
from .base import check_images, finite
from .weighted import Weighted, exactly

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet's deviation of red, green and blue, from -1 to 1."""

SIDE = 256
"""The shorter side that an image is resized to, so that sizes can be compared."""

_AT_ONCE = 8  # images of a prompt that are embedded together

Rows = Float32[Tensor, "b n"]


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
        return self.network(key, lambda: Trunk(key))

    @cached_property
    def _heads(self) -> Heads:
        """The channels' weights; `WrongWeights` if one is negative."""
        key = f"lpips_{self.net}"
        heads = self.network(key, lambda: Heads(TAPS[NETS[self.net]].values()))
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
            pixels = check_images(images).to(device).float() / 127.5 - 1
            pixels = interpolate(pixels, *shortest_to(*sides(pixels), SIDE), "bilinear")
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
