"""Several rewards as one: each rescaled, multiplied by its weight, and added up.

Weights mean nothing before the scales are equal: one PickScore unit is a lot, one JPEG kilobyte
nothing. `Affine` sets the scale by hand, `ZScore` by the values seen; details show both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..pictures.tensors import Pictures
from ..scores import Reward, Scores

Values = Float[Tensor, " b"]


class Scale(Protocol):
    """Rescales a reward's values.

    Attributes:
        name: as in the config.
    """

    name: ClassVar[str]

    def see(self, values: Values) -> None:
        """Update the statistics, if there are any."""
        ...

    def __call__(self, values: Values) -> Values: ...


@dataclass(frozen=True, slots=True)
class Affine:
    """scale * value + shift; the identity by default.

    Attributes:
        scale: 1/26 makes of PickScore what Flow-GRPO trains on.
        shift: added afterwards.
    """

    name: ClassVar[str] = "affine"
    scale: float = 1.0
    shift: float = 0.0

    def see(self, values: Values) -> None:
        """Do nothing: it has no statistics."""

    def __call__(self, values: Values) -> Values:
        return self.scale * values + self.shift


@dataclass(slots=True)
class ZScore:
    """(value - mean) / deviation of all values seen so far (has state).

    The mean and the sum of squares are updated batch by batch in float64 (Chan, Golub and LeVeque
    1983), so that no value is kept. Before two values are seen, or while all are equal, the
    deviation counts as 1.

    Attributes:
        count: values seen.
        mean: of them.
        squares: the sum of their squared distances from it.
    """

    name: ClassVar[str] = "z_score"
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def see(self, values: Values) -> None:
        """Update the statistics; NaN is left out."""
        known = values[values.isfinite()].double()
        if not len(known):
            return
        mean, total = known.mean().item(), self.count + len(known)
        step = mean - self.mean
        self.squares += (known - mean).square().sum().item()
        self.squares += step * step * self.count * len(known) / total
        self.mean += step * len(known) / total
        self.count = total

    @property
    def deviation(self) -> float:
        """The population's deviation; 1 if there is none."""
        spread = (self.squares / self.count) ** 0.5 if self.count > 1 else 0.0
        return spread if spread > 1e-12 * max(1.0, abs(self.mean)) else 1.0

    def __call__(self, values: Values) -> Values:
        return ((values.double() - self.mean) / self.deviation).to(values.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The statistics, for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """A weighted sum of rewards, each scored separately and listed in `details`.

    Attributes:
        rewards: the rewards.
        weights: one factor per reward.
        scales: rescale each reward before its weight; none if empty.
        labels: names in `details`; the rewards' own, numbered where they repeat.
    """

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]
    scales: tuple[Scale, ...] = ()
    labels: tuple[str, ...] = ()
    name: str = "weighted_sum"

    @property
    def needs_prompt(self) -> bool:
        return any(reward.needs_prompt for reward in self.rewards)

    @property
    def bounds(self) -> tuple[float, float]:
        """The sum of the parts' bounds, each in the order its weight's sign gives."""
        low = high = 0.0
        for reward, weight, scale in zip(self.rewards, self.weights, self._scales, strict=True):
            ends = sorted(weight * bound for bound in _bounds(reward, scale))
            low, high = low + ends[0], high + ends[1]
        return low, high

    @property
    def is_elsewhere(self) -> bool:
        return any(reward.is_elsewhere for reward in self.rewards)

    @property
    def _scales(self) -> tuple[Scale, ...]:
        return self.scales or tuple(Affine() for _ in self.rewards)

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        by_reward = [reward.complaints(prompts) for reward in self.rewards]
        return [next(filter(None, whys), None) for whys in zip(*by_reward, strict=True)]

    def modules(self) -> list[nn.Module]:
        return [module for reward in self.rewards for module in reward.modules()]

    def fingerprint(self) -> dict[str, Any]:
        parts = [reward.fingerprint() for reward in self.rewards]
        return {"reward": self.name, "weights": list(self.weights), "parts": parts}

    def score(self, images: Pictures, prompts: Sequence[str]) -> Scores:
        """Score each image with every reward and add them up."""
        return self.total(self.parts(images, prompts))

    def parts(self, images: Pictures, prompts: Sequence[str]) -> list[Scores]:
        """The scores of each reward, on its own scale."""
        return [reward.score(images, prompts) for reward in self.rewards]

    def total(self, parts: Sequence[Scores]) -> Scores:
        """Add up the scores that `parts` gave, of one batch or of several joined.

        Running scales update their statistics first, once. Details have each part as it was, and
        its share if it was rescaled.
        """
        labels = self.labels or unique_names([reward.name for reward in self.rewards])
        count = len(parts[0].values)
        total = torch.zeros(count)
        details: list[dict[str, float]] = [{} for _ in range(count)]
        for label, part, weight, scale in zip(
            labels, parts, self.weights, self._scales, strict=True
        ):
            scale.see(part.values)
            scaled = scale(part.values)
            total = total + weight * scaled
            for row, detail in enumerate(details):
                detail[label] = part.values[row].item()
                if scale != Affine():
                    detail[f"{label} ({scale.name})"] = scaled[row].item()
        errors = tuple(
            next((part.errors[i] for part in parts if part.errors and part.errors[i]), None)
            or (f"the weighted sum is {total[i]:g}" if total[i].isinf() else None)
            for i in range(count)
        )
        return Scores(total.masked_fill(total.isinf(), float("nan")), tuple(details), errors)


def _bounds(reward: Reward, scale: Scale) -> tuple[float, float]:
    if isinstance(scale, Affine):
        low, high = (scale.scale * end + scale.shift for end in reward.bounds)
        return low, high
    return float("-inf"), float("inf")


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with a number where they repeat.

    >>> unique_names(["scene", "remote", "remote"])
    ('scene', 'remote', 'remote 2')
    """
    labels: list[str] = []
    for i, name in enumerate(names):
        before = names[:i].count(name)
        labels.append(f"{name} {before + 1}" if before else name)
    return tuple(labels)
