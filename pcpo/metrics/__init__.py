"""Metrics of image sets: how far apart two sets are, and how diverse the images of one set are.

One file per metric. `FEATURES` names the encoders whose features a Fréchet distance is computed
from; nothing is imported, and no network loaded, before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .base import Features
from .frechet import Distance, frechet_distance, frechet_distance_of
from .inception_score import InceptionScore
from .moments import Moments

__all__ = [
    "FEATURES",
    "Distance",
    "Features",
    "InceptionScore",
    "Moments",
    "frechet_distance",
    "frechet_distance_of",
    "load_features",
]

# name of the distance -> (module in this package, class)
FEATURES: dict[str, tuple[str, str]] = {
    "fd_dinov2": ("dinov2", "Dinov2"),
    "fd_random": ("random_projection", "RandomProjection"),
    "fid": ("inception", "Inception"),
}


def load_features(name: str, **options: Any) -> Features:
    """Make the encoder of a Fréchet distance; its network is loaded when it first encodes.

    Args:
        name: a key of `FEATURES`.
        options: keyword arguments of its class.

    Raises:
        ValueError: for an unknown name; a `RewardUnavailable` if its weights are missing.
    """
    if name not in FEATURES:
        known = ", ".join(sorted(FEATURES))
        raise ValueError(f"there are no features {name!r}; choose one of {known}")
    module, attribute = FEATURES[name]
    return getattr(import_module(f".{module}", __name__), attribute)(**options)
