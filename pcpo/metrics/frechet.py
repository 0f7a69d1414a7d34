"""The Fréchet distance of two sets of features, each taken for a normal distribution.

    d^2 = |m_1 - m_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^1/2

Dowson and Landau 1982. Of Inception's features it is the FID of Heusel et al. 2017,
arXiv:1706.08500, who like everyone after them report d^2 and call it the distance. The last trace
is the sum of the roots of the eigenvalues of A^T S_2 A, where S_1 = A A^T: these are all real and
not negative, which those of a matrix root are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .base import finite
from .moments import Moments

Matrix = Float64[Tensor, "d d"]


@dataclass(frozen=True, slots=True)
class Distance:
    """A Fréchet distance and what it was computed from.

    Attributes:
        value: d^2, >= 0.
        images: in each of the two sets.
        note: one sentence that a reader must know; None if there is nothing to say.
    """

    value: float
    images: tuple[int, int]
    note: str | None = None


def frechet_distance(one: Moments, other: Moments) -> Distance:
    """The distance of two sets by their moments.

    >>> from .moments import Moments
    >>> one, other = Moments(1), Moments(1)
    >>> one.add(torch.tensor([[-1.0], [0.0], [1.0]]))  # mean 0, deviation 1
    >>> other.add(torch.tensor([[1.0], [4.0], [7.0]]))  # mean 4, deviation 3
    >>> frechet_distance(one, other)  # 4^2 + (3 - 1)^2
    Distance(value=20.0, images=(3, 3), note=None)

    Returns:
        The distance, with a note if there are fewer images than a covariance needs.

    Raises:
        ValueError: if the sets have different features, or fewer than two images.
    """
    if one.size != other.size:
        raise ValueError(f"sets of {one.size} and of {other.size} features cannot be compared")
    first, second = one.covariance, other.covariance
    root = _factor(first)
    common = torch.linalg.eigvalsh(root.T @ second @ root).clamp_min(0).sqrt().sum()
    spread, counts = first.trace() + second.trace(), (one.count, other.count)
    return _distance(one.mean - other.mean, spread, common, counts)


def frechet_distance_of(features: Float[Tensor, "n d"], others: Float[Tensor, "m d"]) -> Distance:
    """The distance of two small sets by the features themselves.

    It equals that of their moments, without a matrix of d x d: of centred rows X and Y the last
    trace is the nuclear norm of X Y^T over the root of (n - 1)(m - 1). So sets of one prompt cost
    little.

    Returns:
        The distance, with a note if there are fewer images than a covariance needs.

    Raises:
        ValueError: if the sets have different features, or fewer than two images.
    """
    if features.shape[1] != others.shape[1]:
        wide = f"{features.shape[1]} and of {others.shape[1]}"
        raise ValueError(f"sets of {wide} features cannot be compared")
    if min(len(features), len(others)) < 2:
        raise ValueError(
            f"a covariance needs two images at the very least, and there are {len(features)} and "
            f"{len(others)}"
        )
    rows = [finite(x.detach().to("cpu", torch.float64), "features") for x in (features, others)]
    means = [x.mean(0) for x in rows]
    scaled = [(x - mean) / (len(x) - 1) ** 0.5 for x, mean in zip(rows, means, strict=True)]
    common = torch.linalg.svdvals(scaled[0] @ scaled[1].T).sum()
    spread = scaled[0].square().sum() + scaled[1].square().sum()
    return _distance(means[0] - means[1], spread, common, (len(features), len(others)))


def _factor(covariance: Matrix) -> Matrix:
    """A with A A^T the covariance: by Cholesky if it is regular, which is faster."""
    triangle, where = torch.linalg.cholesky_ex(covariance)
    if not where:
        return triangle
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt()


def _distance(
    apart: Float64[Tensor, " d"], spread: Tensor, common: Tensor, images: tuple[int, int]
) -> Distance:
    """The formula, from the difference of the means, the sum of the traces and the last trace."""
    value = float(apart.square().sum() + spread - 2 * common)
    return Distance(max(value, 0.0), images, _few(images, len(apart)))


def _few(images: tuple[int, int], size: int) -> str | None:
    """A warning about a distance of few images."""
    if min(images) > size:
        return None
    return (
        f"a covariance of {size} features needs more than {size} images, and there are {images[0]} "
        f"and {images[1]}: the distance is far too large, and comparable only with distances of "
        "as many images"
    )
