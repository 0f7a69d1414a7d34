"""Mean and covariance of features, from batches as they come; memory does not grow with images.

Shapes: b images in a batch, d features of each. All in float64 on the CPU.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .base import finite


class Moments:
    """Count, mean and scatter of rows, S = sum (x - mean)(x - mean)^T.

    A batch is joined by Chan, Golub and LeVeque 1983: with delta the difference of their means,
    S = S_1 + S_2 + delta delta^T n_1 n_2 / (n_1 + n_2), which loses no digits to a large mean.

    >>> all_at_once, in_parts = Moments(2), Moments(2)
    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    >>> all_at_once.add(rows)
    >>> for row in rows.split(1):
    ...     in_parts.add(row)
    >>> all_at_once.covariance.tolist(), torch.equal(in_parts.mean, all_at_once.mean)
    ([[4.0, 6.0], [6.0, 12.0]], True)
    """

    def __init__(self, size: int) -> None:
        """Begin with no rows."""
        self.count = 0
        self.mean: Float64[Tensor, " d"] = torch.zeros(size, dtype=torch.float64)
        self.scatter: Float64[Tensor, "d d"] = torch.zeros(size, size, dtype=torch.float64)

    @property
    def size(self) -> int:
        return len(self.mean)

    def add(self, rows: Float[Tensor, "b d"]) -> None:
        """Take in a batch, on any device.

        Raises:
            ValueError: if it has another number of features or some are not finite; nothing is
                taken
                in then.
        """
        if rows.ndim != 2 or rows.shape[1] != self.size:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)} do not fit moments of {self.size} features"
            )
        if not len(rows):
            return
        rows = finite(rows.detach().to("cpu", torch.float64), "features")
        mean = rows.mean(0)
        rows = rows - mean
        self.scatter.addmm_(rows.T, rows)
        total, delta = self.count + len(rows), mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.count * len(rows) / total)
        self.mean += delta * (len(rows) / total)
        self.count = total

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance, S / (n - 1); `ValueError` for fewer than two rows."""
        if self.count < 2:
            raise ValueError(
                f"a covariance needs two images at the very least, and there are {self.count}"
            )
        return self.scatter / (self.count - 1)
