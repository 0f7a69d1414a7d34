"""How alike two images are by their pixels and by SSIM, and how diverse the images of a prompt are.

No network is needed. Neither measure knows what is shown: two crops of one scene count as
different.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from ..pictures.tensors import Images
from ..rewards.analytic import luma
from .base import check_images

TAPS = 11
"""Pixels across SSIM's window."""

_DEVIATION = 1.5  # of SSIM's window, in pixels
_STABLE = (0.01**2, 0.03**2)  # SSIM's constants, of grey levels from 0 to 1
_SIDE = 256  # pixels about which the shorter side is reduced to before SSIM
_PAIRS = 1000  # most pairs of one prompt that are compared
_SEED = 7

Values = Float32[Tensor, " b"]
Grey = Float[Tensor, "b 1 h w"]


def rms(one: Images, other: Images) -> Values:
    """RMS difference of each image and its counterpart, over pixels from 0 to 1: 0 to 1.

    >>> black = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    >>> rms(black, 51 + black).item()
    0.20000000298023224
    """
    one, other = _alike(one, other)
    return (one.float() - other.float()).square().mean((1, 2, 3)).sqrt().cpu() / 255


def pixel_diversity(images: Images, most: int = _PAIRS) -> float:
    """The mean `rms` over pairs of at least two images of one prompt: 0 (all equal) to 1.

    Args:
        images: of one prompt.
        most: pairs compared; beyond it a fixed random choice of that many.
    """
    return _mean_over_pairs(check_images(images), most, lambda i, j: rms(images[i], images[j]))


def ssim_diversity(images: Images, most: int = _PAIRS) -> float:
    """1 minus the mean `ssim` over pairs of at least two images of one prompt: 0 (all equal) to 2.

    Args:
        images: of one prompt, of 11 x 11 pixels at least.
        most: pairs compared; beyond it a fixed random choice of that many.
    """
    seen = _window_statistics(check_images(images, TAPS))
    return 1 - _mean_over_pairs(images, most, lambda i, j: _similarity(seen[i], seen[j]))


def pairs_of(count: int, most: int = _PAIRS) -> list[tuple[int, int]]:
    """All pairs of at least two images, or a fixed random choice of `most`, in order.

    >>> pairs_of(3), len(pairs_of(100, most=50))
    ([(0, 1), (0, 2), (1, 2)], 50)
    """
    if count < 2:
        raise ValueError(f"a diversity needs two images of a prompt, and there are {count}")
    everyone = list(combinations(range(count), 2))
    if len(everyone) <= most:
        return everyone
    chosen = np.random.RandomState(_SEED).permutation(len(everyone))[:most]
    return [everyone[i] for i in sorted(chosen)]


def _mean_over_pairs(images: Images, most: int, compare: Callable[..., Values]) -> float:
    """The mean of a comparison over pairs, 16 at a time."""
    pairs = torch.tensor(pairs_of(len(images), most))
    return float(torch.cat([compare(*p.unbind(1)) for p in pairs.split(16)]).double().mean())


def _alike(one: Images, other: Images) -> tuple[Images, Images]:
    """Check that two batches can be compared."""
    if check_images(one).shape != check_images(other).shape:
        raise ValueError(
            f"images of shapes {tuple(one.shape)} and {tuple(other.shape)} cannot be compared one "
            "with the other; compare images of one size"
        )
    return one, other


DIVERSITIES: dict[str, Callable[[Images], float]] = {
    "pixel_diversity": pixel_diversity,
    "ssim_diversity": ssim_diversity,
}
"""By the names that configs and files use."""


@dataclass(frozen=True, slots=True)
class _WindowStatistics:
    """Grey images, and the window statistics of each that SSIM needs."""

    grey: Grey
    mean: Grey
    variance: Grey

    def __getitem__(self, rows: Tensor) -> _WindowStatistics:
        return _WindowStatistics(self.grey[rows], self.mean[rows], self.variance[rows])


def _window_statistics(images: Images) -> _WindowStatistics:
    check_images(images, TAPS)
    grey = luma(images.float() / 255)[:, None]
    factor = max(1, round(min(grey.shape[2:]) / _SIDE))
    grey = functional.avg_pool2d(grey, factor) if factor > 1 else grey
    mean = _window_mean(grey)
    return _WindowStatistics(grey, mean, _window_mean(grey.square()) - mean.square())


def _similarity(one: _WindowStatistics, other: _WindowStatistics) -> Values:
    means = one.mean * other.mean
    together = _window_mean(one.grey * other.grey) - means
    light = (2 * means + _STABLE[0]) / (one.mean.square() + other.mean.square() + _STABLE[0])
    structure = (2 * together + _STABLE[1]) / (one.variance + other.variance + _STABLE[1])
    return (light * structure).mean((1, 2, 3))


def _window_mean(grey: Grey) -> Grey:
    """The mean under SSIM's window, where it fits."""
    at = torch.arange(TAPS, dtype=grey.dtype, device=grey.device) - TAPS // 2
    weights = torch.exp(-at.square() / (2 * _DEVIATION**2))
    weights = (weights / weights.sum()).view(1, 1, 1, TAPS)
    return functional.conv2d(functional.conv2d(grey, weights), weights.transpose(2, 3))
