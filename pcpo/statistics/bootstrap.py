"""The percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Statistic = Callable[..., Any]

RESAMPLES = 10_000


def bootstrap(values: Sequence[float], statistic: Statistic = np.mean) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval, with a fixed seed.

    Args:
        values: one an independent unit, such as a seed or a prompt; at least two. Infinity where a
            target was not reached.
        statistic: of the units; called with resamples in rows and `axis=1`.

    Returns:
        Its ends, the 2.5% and 97.5% quantiles of the statistic over 10,000 resamples.

    Raises:
        ValueError: of less than two values, or where one is NaN.
    """
    known = np.asarray(values, dtype=float)
    if len(known) < 2 or np.isnan(known).any():
        raise ValueError(
            f"an interval needs two values at least and none that is NaN; there are {len(known)}, "
            f"{int(np.isnan(known).sum())} of them NaN"
        )
    chosen = np.random.default_rng(0).integers(len(known), size=(RESAMPLES, len(known)))
    found = np.sort(statistic(known[chosen], axis=1))
    tail = round(0.025 * RESAMPLES)  # sorted, since infinities cannot be interpolated
    return float(found[tail]), float(found[-1 - tail])
