"""The networks of metrics, from which the names and shapes in their weight files follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .dinov2 import SPECS, VisionTransformer
from .inception2015 import Inception2015
from .lpips_net import TAPS, Heads, Trunk
from .shapes import Shapes

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "inception_2015": Inception2015,
    "dinov2_large": lambda: VisionTransformer(SPECS["dinov2_large"]),
    "alexnet": lambda: Trunk("alexnet"),
    "vgg16": lambda: Trunk("vgg16"),
    "lpips_alex": lambda: Heads(TAPS["alexnet"].values()),
    "lpips_vgg": lambda: Heads(TAPS["vgg16"].values()),
}
"""By key of the catalogue."""


def network_shapes(key: str) -> Shapes:
    """Names and shapes of all weights of a network, by its key in `NETWORKS`.

    >>> network_shapes("lpips_alex")["lin1.model.1.weight"]
    (1, 192, 1, 1)
    """
    with torch.device("meta"):
        network = NETWORKS[key]()
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
