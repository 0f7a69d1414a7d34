"""LPIPS's networks: torchvision's AlexNet or VGG-16, and the linear heads on their layers."""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Float
from torch import Tensor, nn

from ...remedies import install
from ..errors import RewardUnavailable

NETS = {"alex": "alexnet", "vgg": "vgg16"}
TAPS = {
    "alexnet": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    "vgg16": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
}
"""The rectifiers after which images are compared, by number in `features`, and their channels."""


class Trunk(nn.Module):
    """The convolutions of a classifier in torchvision, by its name there."""

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            from torchvision import models
        except ImportError as error:
            raise RewardUnavailable(
                f"LPIPS needs the package 'torchvision', which is not installed; run "
                f"{install('torchvision')} and start again"
            ) from error
        self.taps = TAPS[name]
        self.features = getattr(models, name)(weights=None).features[: max(self.taps) + 1]

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b c i j"]]:
        """The features at which images are compared."""
        features = []
        for at, layer in enumerate(self.features):
            x = layer(x)
            if at in self.taps:
                features.append(x)
        return features


class Heads(nn.Module):
    """The channels' weights, with their names in the `lpips` package."""

    def __init__(self, widths: Iterable[int]) -> None:
        super().__init__()
        for i, width in enumerate(widths):
            layer = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": nn.ModuleDict({"1": layer})}))

    def roots(self) -> list[Float[Tensor, "c 1 1"]]:
        """The square root of each weight, by layer."""
        return [weight[0].sqrt() for weight in self.parameters()]
