"""A linear mixed model: fixed effects, and an intercept of each group drawn at random.

    y = X beta + u_group + e,  u ~ N(0, s_u^2),  e ~ N(0, s_e^2)

With groups the prompts, it compares methods within prompts, so that easy and hard prompts do not
blur the comparison. Shapes: n observations, p effects, g groups.

It is fitted by restricted maximum likelihood (REML; Patterson and Thompson 1971, Harville 1977).
Given the ratio r = s_u^2 / s_e^2 all else has a closed form, since the covariance of a group of m
observations is s_e^2 (I + r 1 1^T), with the inverse (I - 1 1^T r / (1 + m r)) / s_e^2: the
likelihood is searched over r alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from .design import Design, Matrix, Vector

_RATIOS = np.linspace(math.log(1e-8), math.log(1e8), 129)  # where r is first looked for, as log r
_CLOSE = 1e-10  # of log r: where the search ends
_FEW = 20  # groups below which a normal distribution is no good one for z


@dataclass(frozen=True, slots=True)
class Coefficient:
    """A fixed effect.

    Attributes:
        name: of its column.
        value: the estimate.
        error: its standard error.
        z: value / error.
        p: of the null hypothesis that it is 0, two-sided, with z normal.
        low: where its 95% interval begins.
        high: where it ends.
    """

    name: str
    value: float
    error: float
    z: float
    p: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class MixedModel:
    """A fitted model.

    Attributes:
        coefficients: of the fixed effects.
        group_variance: s_u^2.
        residual_variance: s_e^2.
        log_likelihood: restricted, with all its constants.
        observations: n.
        groups: g.
        note: one sentence that a reader must know; None if there is nothing to say.
    """

    coefficients: tuple[Coefficient, ...]
    group_variance: float
    residual_variance: float
    log_likelihood: float
    observations: int
    groups: int
    note: str | None = None

    def __getitem__(self, name: str) -> Coefficient:
        return next(coefficient for coefficient in self.coefficients if coefficient.name == name)


@dataclass(frozen=True, slots=True)
class _Sums:
    """All that the likelihood depends on.

    Attributes:
        xx, xy, yy: X^T X, X^T y, y^T y.
        x, y: their sums over each group.
    """

    xx: Matrix
    xy: Vector
    yy: float
    x: Matrix
    y: Vector
    sizes: Vector

    def weigh(self, ratio: float) -> tuple[Matrix, Vector, float]:
        """X^T V^-1 X, X^T V^-1 y and y^T V^-1 y with V = I + r 1 1^T in each group."""
        share = ratio / (1 + ratio * self.sizes)
        xx = self.xx - (self.x.T * share) @ self.x
        return xx, self.xy - self.x.T @ (share * self.y), self.yy - float(share @ self.y**2)


@dataclass(frozen=True, slots=True)
class _Fit:
    """What follows from a ratio."""

    beta: Vector
    inverse: Matrix
    residual_variance: float
    log_likelihood: float


def fit_mixed_model(
    values: Sequence[float], design: Design, groups: Sequence[Hashable]
) -> MixedModel:
    """Fit a model to observations.

    >>> from .design import Factor, design_of
    >>> method = Factor("method", ["base", "pcpo"] * 3)
    >>> model = fit_mixed_model([1.0, 2.0, 5.0, 6.1, 3.0, 3.9], design_of(method), "aabbcc")
    >>> round(model["method[pcpo]"].value, 3), round(model["method[pcpo]"].error, 3)
    (1.0, 0.058)

    Args:
        values: the metric of each observation.
        design: the fixed effects of each.
        groups: of each observation, such as its prompt.

    Returns:
        The model, with a note if its p-values need care.

    Raises:
        ValueError: if the lengths differ, a value is not finite, there are fewer than two
            groups, or too few observations for the effects.
    """
    y, x = np.asarray(values, dtype=float), design.columns
    count, effects = x.shape
    if len(y) != count or len(groups) != count:
        raise ValueError(
            f"there are {len(y)} values, {len(groups)} groups and {count} rows of effects; give "
            "one of each an observation"
        )
    if not np.isfinite(y).all():
        raise ValueError(
            f"{int((~np.isfinite(y)).sum())} of {count} values are not finite; leave them out"
        )
    names = list(dict.fromkeys(groups))
    if len(names) < 2 or count <= effects + 1:
        raise ValueError(
            f"a mixed model of {effects} effects needs two groups and more than {effects + 1} "
            f"observations, and there are {len(names)} and {count}"
        )
    _separate(design)
    if np.linalg.lstsq(x, y - y.mean())[1].sum() <= 1e-24 * max(1.0, float(y @ y)):
        raise ValueError("the effects explain the values exactly: there is nothing left to model")
    place = {name: i for i, name in enumerate(names)}
    sums, middle = _sums_of(y, x, np.array([place[name] for name in groups]), len(names))
    ratio = _best(lambda r: _fit(sums, r, count).log_likelihood)
    fit = _fit(sums, ratio, count)
    beta = fit.beta + np.linalg.lstsq(x, np.full(count, middle))[0]
    coefficients = [
        _coefficient(name, float(value), math.sqrt(fit.residual_variance * float(square)))
        for name, value, square in zip(design.names, beta, np.diag(fit.inverse), strict=True)
    ]
    return MixedModel(
        tuple(coefficients),
        ratio * fit.residual_variance,
        fit.residual_variance,
        fit.log_likelihood,
        count,
        len(names),
        _note(len(names), ratio),
    )


def _separate(design: Design) -> None:
    """Refuse linearly dependent effects, by `ValueError`."""
    for i, name in enumerate(design.names, 1):
        if np.linalg.matrix_rank(design.columns[:, :i]) < i:
            raise ValueError(
                f"the effect {name} cannot be told from those before it with these observations; "
                "leave it out"
            )


def _sums_of(y: Vector, x: Matrix, group: np.ndarray, count: int) -> tuple[_Sums, float]:
    """The sums, of values less their mean, and that mean."""
    middle = float(y.mean())
    y = y - middle
    by_group = np.zeros((count, x.shape[1]))
    np.add.at(by_group, group, x)
    of_y = np.bincount(group, y, count)
    sizes = np.bincount(group, minlength=count).astype(float)
    return _Sums(x.T @ x, x.T @ y, float(y @ y), by_group, of_y, sizes), middle


def _fit(sums: _Sums, ratio: float, count: int) -> _Fit:
    """The estimates at a ratio, and the restricted log-likelihood there."""
    xx, xy, yy = sums.weigh(ratio)
    free = count - len(xy)
    inverse = np.linalg.inv(xx)
    beta = inverse @ xy
    variance = (yy - float(xy @ beta)) / free
    volumes = float(np.log1p(ratio * sums.sizes).sum()) + float(np.linalg.slogdet(xx)[1])
    return _Fit(
        beta,
        inverse,
        variance,
        -0.5 * (free * (math.log(2 * math.pi * variance) + 1) + volumes),
    )


def _best(likelihood: Callable[[float], float]) -> float:
    """The ratio of the largest likelihood: on a grid, then between its neighbours."""
    likelihoods = [likelihood(math.exp(at)) for at in _RATIOS]
    top = int(np.argmax(likelihoods))
    low, high = _RATIOS[max(top - 1, 0)], _RATIOS[min(top + 1, len(_RATIOS) - 1)]
    shrink = (math.sqrt(5) - 1) / 2
    while high - low > _CLOSE:  # golden section
        left, right = high - shrink * (high - low), low + shrink * (high - low)
        if likelihood(math.exp(left)) < likelihood(math.exp(right)):
            low = left
        else:
            high = right
    ratio = math.exp((low + high) / 2)
    return ratio if likelihood(ratio) > likelihood(0.0) else 0.0


def _coefficient(name: str, value: float, error: float) -> Coefficient:
    z, reach = value / error, NormalDist().inv_cdf(0.975) * error
    p = math.erfc(abs(z) / math.sqrt(2))
    return Coefficient(name, value, error, z, p, value - reach, value + reach)


def _note(groups: int, ratio: float) -> str | None:
    told = []
    if ratio == 0:
        told.append("the groups do not differ by more than chance (their variance is 0)")
    if groups < _FEW:
        told.append(f"with {groups} groups the p-values and intervals are somewhat too optimistic")
    return "; ".join(told) or None
