"""The rules of a run's guard: what is out of bounds, what ends the run, which iteration is best.

Every few iterations the guard samples held-out prompts at fixed seeds and compares the images with
the base's. A reward that is exploited rises while another one, or the diversity of the images,
falls. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...config.sections import GuardConfig

Best = tuple[float, int]
"""A reward, and its iteration."""


@dataclass(frozen=True, slots=True)
class Look:
    """The guard's measurements of its images.

    Attributes:
        reward: mean of the trained reward, in one number.
        diversity: mean over prompts of how unlike each other their images are.
        drift: mean RMS of the pixels' difference from the base's images, 0 to 1.
        second: mean of the second reward, if there is one.
    """

    reward: float
    diversity: float
    drift: float = 0.0
    second: float | None = None

    @property
    def line(self) -> dict[str, float]:
        """Its part of a line of metrics.jsonl."""
        return {f"guard_{k}": value for k, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The consequence of a measurement for the run.

    Attributes:
        faults: one clause for each bound that is broken.
        strikes: consecutive measurements out of bounds, including this one.
        best: the highest reward within the bounds so far, if there is one.
        ends: whether the run is to end.
    """

    iteration: int
    look: Look
    faults: tuple[str, ...]
    strikes: int
    best: Best | None
    ends: bool

    @property
    def is_kept(self) -> bool:
        """Whether to save the iteration: the best so far, or the last."""
        return self.ends or (self.best is not None and self.best[1] == self.iteration)

    @property
    def line(self) -> dict[str, float]:
        """Its part of a line of metrics.jsonl."""
        return self.look.line | {"guard_strikes": self.strikes}


@dataclass(frozen=True, slots=True)
class Rules:
    """The bounds of a run.

    Attributes:
        start: the measurements of the base.
    """

    config: GuardConfig
    start: Look

    def assess(self, look: Look, iteration: int, strikes: int, best: Best | None) -> Verdict:
        """Judge a measurement.

        Args:
            strikes: consecutive measurements out of bounds before it.
        """
        faults = self.faults(look)
        strikes = strikes + 1 if faults else 0
        if not faults and (best is None or look.reward > best[0]):
            best = (look.reward, iteration)
        return Verdict(iteration, look, faults, strikes, best, strikes >= self.config.patience)

    @property
    def bounds(self) -> dict[str, float]:
        """The limit of each value that has one, in its own units."""
        asked, limits = self.config, {}
        if asked.min_diversity:
            limits["diversity"] = asked.min_diversity * self.start.diversity
        if asked.max_drift:
            limits["drift"] = asked.max_drift
        if asked.max_fall is not None and self.start.second is not None:
            limits["second"] = self.start.second - asked.max_fall
        return limits

    @property
    def names(self) -> dict[str, str]:
        """A title for each value of a look."""
        diversity = self.config.diversity.replace("_", " ")
        names = {"diversity": diversity, "drift": "drift in pixels"}
        if self.config.reward is not None:
            names["second"] = self.config.reward
        return names

    def faults(self, look: Look) -> tuple[str, ...]:
        """A clause for each bound that a look breaks.

        >>> Rules(GuardConfig(), Look(reward=0.4, diversity=0.3)).faults(Look(0.9, 0.06))
        ('pixel diversity is 0.06, below 0.15 (the base has 0.3)',)
        """
        clauses = []
        for value, bound in self.bounds.items():
            now, start = getattr(look, value), getattr(self.start, value)
            is_above = value == "drift"
            if not (now <= bound if is_above else now >= bound):  # NaN is out of bounds
                words = "above" if is_above else "below"
                base = "" if is_above else f" (the base has {start:.3g})"
                clauses.append(f"{self.names[value]} is {now:.3g}, {words} {bound:.3g}{base}")
        return tuple(clauses)

    @property
    def sentence(self) -> str:
        """The rule in plain words."""
        asked, limits = self.config, []
        if asked.min_diversity:
            limits.append(
                f"{self.names['diversity']} is below {asked.min_diversity:g} of the base's"
            )
        if asked.max_drift:
            limits.append(f"{self.names['drift']} is above {asked.max_drift:g}")
        if asked.max_fall is not None:
            limits.append(f"{asked.reward} is more than {asked.max_fall:g} below the base's")
        every = "every iteration" if asked.every == 1 else f"every {asked.every} iterations"
        where = (
            f"The guard looks {every} at {asked.prompts} held-out prompts, {asked.images} images "
            "each. "
        )
        if not limits:
            return where + "It has no bounds; the best iteration is the one of highest reward."
        looks = "one look" if asked.patience == 1 else f"{asked.patience} looks in a row"
        return (
            f"{where}Out of bounds is where {' or '.join(limits)}. Training ends after {looks} out "
            "of bounds; the best iteration is the one of highest reward within the bounds."
        )

    def describe(self, verdict: Verdict) -> str:
        """A verdict in one sentence, without its full stop."""
        best = "no iteration was within the bounds"
        if verdict.best is not None:
            reward, iteration = verdict.best
            best = (
                f"the best within the bounds is iteration {iteration}, with a reward of "
                f"{reward:.3g} (the base has {self.start.reward:.3g})"
            )
        at = f"iteration {verdict.iteration}"
        if not verdict.faults:
            return f"{at} is within the guard's bounds; {best}"
        faults = " and ".join(verdict.faults)
        if verdict.ends:
            return f"ended by the guard at {at}: {faults}; {best}"
        return f"{at} is out of the guard's bounds: {faults}; {best}"

    def record(self, verdict: Verdict | None = None) -> dict[str, Any]:
        """The job folder's record of the guard, for others to read.

        Sentences, the best iteration, and each value's name, start and bound; `verdict` is the last
        one.
        """
        bounds, start = self.bounds, asdict(self.start)
        named = {"reward": "reward", **self.names}
        return {
            "rule": self.sentence,
            "said": None if verdict is None else self.describe(verdict),
            "ended": verdict is not None and verdict.ends,
            "best": verdict.best[1] if verdict is not None and verdict.best else None,
            "values": {
                f"guard_{key}": {"name": name, "start": start[key], "bound": bounds.get(key)}
                for key, name in named.items()
            },
        }


def start_of(record: Mapping[str, Any]) -> Look:
    """The measurements of the base, from a record.

    >>> rules = Rules(GuardConfig(), Look(reward=0.4, diversity=0.3))
    >>> start_of(rules.record()) == rules.start
    True
    """
    values = {key.removeprefix("guard_"): part["start"] for key, part in record["values"].items()}
    return Look(**values)
