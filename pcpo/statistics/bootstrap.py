"""The percentile bootstrap, of one factor and of two crossed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Statistic = Callable[..., Any]

RESAMPLES = 10_000


def bootstrap(values: Sequence[float], statistic: Statistic = np.mean) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval, with a fixed seed.

    Args:
        values: one per independent unit, such as a seed or a prompt; at least two. Infinity if a
            target was not reached.
        statistic: of the units; called with resamples in rows and `axis=1`.

    Returns:
        The 2.5% and 97.5% quantiles of the statistic over 10,000 resamples.

    Raises:
        ValueError: for fewer than two values, or NaN.
    """
    known = np.asarray(values, dtype=float)
    if len(known) < 2 or np.isnan(known).any():
        raise ValueError(
            f"an interval needs two values at least and none that is NaN; there are {len(known)}, "
            f"{int(np.isnan(known).sum())} of them NaN"
        )
    chosen = np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))
    return interval(statistic(known[chosen], axis=1))


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """ "mean", "low" and "high" of the bootstrap: None what is not known.

    >>> estimate([2.0]), estimate([])["mean"]
    ({'mean': 2.0, 'low': None, 'high': None}, None)
    """
    low, high = bootstrap(values) if len(values) > 1 else (None, None)
    return {"mean": float(np.mean(values)) if len(values) else None, "low": low, "high": high}


def interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of a statistic's resamples, each one of the numbers.

    Args:
        resampled: one number per resample, none of them NaN; infinities sort to the ends.
    """
    ordered, tail = np.sort(resampled), round(0.025 * len(resampled))
    return float(ordered[tail]), float(ordered[-1 - tail])


def resample_crossed(values: np.ndarray) -> np.ndarray:
    """Resamples of two crossed factors, each drawn by itself: the pigeonhole bootstrap.

    Rows and columns are both samples, of seeds and of prompts for example. An interval over one of
    them alone says nothing about other values of the other. This one is a little too wide rather
    than too narrow (Owen 2007, Annals of Applied Statistics 1(2), 386-411).

    Args:
        values: (rows, columns, *rest), all finite.

    Returns:
        (10,000, rows, *rest): the rows of each resample, averaged over its columns.
    """
    rows, columns, *_ = values.shape
    random = np.random.default_rng(0)
    drawn = random.integers(rows, size=(RESAMPLES, rows))
    shares = random.multinomial(columns, np.full(columns, 1 / columns), size=RESAMPLES) / columns
    means = np.tensordot(shares, values, axes=(1, 1))  # (resamples, rows, *rest)
    return means[np.arange(RESAMPLES)[:, None], drawn]
