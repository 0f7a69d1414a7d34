"""The matrix of fixed effects, from the levels of factors such as method and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float64

Matrix = Float64[np.ndarray, "n p"]
Vector = Float64[np.ndarray, " n"]

INTERCEPT = "intercept"


@dataclass(frozen=True, slots=True)
class Factor:
    """Something that was varied, with one level per observation.

    Attributes:
        name: such as "method".
        values: the level of each observation.
        levels: in the order of the table, the reference first; None takes them as they come.
    """

    name: str
    values: Sequence[Any]
    levels: Sequence[Any] | None = None

    def contrasts(self) -> dict[str, Vector]:
        """1 where an observation has a level, else 0, for all levels but the reference.

        Returns:
            One column each, by a name such as "method[pcpo]".

        Raises:
            ValueError: for a single level, or a value that is no level.
        """
        levels = list(dict.fromkeys(self.values if self.levels is None else self.levels))
        strange = [value for value in self.values if value not in levels]
        if strange:
            raise ValueError(f"{strange[0]!r} is no level of {self.name!r}, which has {levels}")
        lacking = [level for level in levels if level not in self.values]
        if len(levels) < 2 or lacking:
            raise ValueError(
                f"the factor {self.name!r} has no observation of {lacking or 'a second level'}; "
                "leave the factor or the level out"
            )
        return {
            f"{self.name}[{level}]": np.array([float(value == level) for value in self.values])
            for level in levels[1:]
        }


@dataclass(frozen=True, slots=True)
class Design:
    """Fixed effects.

    Attributes:
        names: of the columns.
        columns: n observations, p effects.
    """

    names: tuple[str, ...]
    columns: Matrix


def design_of(*factors: Factor, interactions: bool = True) -> Design:
    """An intercept, the factors' effects, and the interactions of each two factors.

    A level's effect is its difference from the reference level (treatment coding), as in the
    formula `metric ~ method * batch`: the method's effect is that at the reference batch, and an
    interaction is how much it differs at another.

    >>> method = Factor("method", ["base", "base", "pcpo", "pcpo"])
    >>> batch = Factor("batch", [8, 16, 8, 16])
    >>> found = design_of(method, batch)
    >>> found.names
    ('intercept', 'method[pcpo]', 'batch[16]', 'method[pcpo]:batch[16]')
    >>> found.columns[-1].tolist()
    [1.0, 1.0, 1.0, 1.0]

    Raises:
        ValueError: if the factors have different numbers of observations.
    """
    counts = {factor.name: len(factor.values) for factor in factors}
    if len(counts) < len(factors) or len(set(counts.values())) != 1:
        raise ValueError(
            f"the factors have different numbers of observations, or one name: {counts}"
        )
    parts = [factor.contrasts() for factor in factors]
    columns = {INTERCEPT: np.ones(len(factors[0].values))}
    for part in parts:
        columns |= part
    for i, one in enumerate(parts):
        for other in parts[i + 1 :] if interactions else ():
            pairs = product(one.items(), other.items())
            columns |= {f"{a}:{b}": x * y for (a, x), (b, y) in pairs}
    return Design(tuple(columns), np.stack(list(columns.values()), 1))
