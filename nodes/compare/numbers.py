"""Two sides at equal prompts and seeds, in numbers: means, wins, diversity, and a table of them.

A is the first side, B the second. The table is Markdown whose columns are aligned, so that it can
be read as text too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from ...pcpo.metrics.similarity import pixel_diversity, ssim_diversity
from ...pcpo.rewards import Scores
from ...pcpo.statistics import Rate, bootstrap, win_rate
from ...pcpo.statistics.tables import markdown
from ..errors import NodeError
from ..rewards.show import part_names

Values = Float[Tensor, "2 prompts seeds"]
"""A number of each side's image of a prompt and a seed; NaN where it has none."""

SIDES = ("A", "B")
NONE = "-"
HOW = (
    "Means are over prompts, or over seeds if there is one prompt. The interval of B - A is the "
    "paired bootstrap's over them; that of the wins is Wilson's, over pairs of equal prompt and "
    "seed."
)
DIVERSITY = (
    "Diversity is how far apart two images of a prompt are on average: the root mean square of "
    "pixels from 0 to 1, and 1 minus the structural similarity (SSIM)."
)
NO_DIVERSITY = "Diversity cannot be measured: it needs two images per prompt on both sides."
DIVERSITIES: dict[str, Callable[[Tensor], float]] = {
    "pixel diversity": pixel_diversity,
    "SSIM diversity": ssim_diversity,
}


@dataclass(frozen=True, slots=True)
class Wins:
    """How often each side won, by pairs of equal prompt and seed.

    Attributes:
        won: pairs in which B is greater.
        tied: in which both are equal.
    """

    won: int
    lost: int
    tied: int

    @property
    def rate(self) -> Rate:
        """B's share with Wilson's 95% interval; a tie is half a win."""
        return win_rate(self.won, self.lost, self.tied)

    def __str__(self) -> str:
        """In words."""
        of = f"{self.won} of {self.won + self.lost + self.tied} pairs"
        return f"{of}, {self.tied} being equal" if self.tied else of


@dataclass(frozen=True, slots=True)
class Line:
    """One number of both sides.

    Attributes:
        means: of A and of B, over what both have.
        interval: 95% of the mean of B - A, by the paired bootstrap; None of a single pair.
        wins: pair by pair; None where that is not counted.
    """

    name: str
    means: tuple[float, float]
    interval: tuple[float, float] | None
    wins: Wins | None = None

    @property
    def difference(self) -> float:
        """The mean of B - A."""
        return self.means[1] - self.means[0]


def compare(name: str, values: Values) -> Line | None:
    """Compare a number at equal prompts and seeds.

    The bootstrap draws prompts, whose images are averaged first; seeds if there is one prompt.

    >>> compare("score", torch.tensor([[[1.0, 2.0]], [[2.0, 2.0]]]))
    Line(name='score', means=(1.5, 2.0), interval=(0.0, 1.0), wins=Wins(won=1, lost=0, tied=1))

    Returns:
        The comparison of the pairs that have both; None where there is none.
    """
    known = values.isfinite().all(0)
    if not known.any():
        return None
    pairs = values[:, known].double()
    apart = pairs[1] - pairs[0]
    wins = Wins(*(int(was.sum()) for was in (apart > 0, apart < 0, apart == 0)))
    units = pairs
    if int(known.any(1).sum()) > 1:
        by_prompt = values.double().masked_fill(~known, math.nan).nanmean(2)
        units = by_prompt[:, known.any(1)]
    one, other = units.mean(1).tolist()
    differences = (units[1] - units[0]).tolist()
    interval = bootstrap(differences) if len(differences) > 1 else None
    return Line(name, (one, other), interval, wins)


def lines_of(name: str, scores: Scores, shape: tuple[int, ...]) -> list[Line]:
    """A reward and its parts, compared."""
    whole = compare(name, scores.values.view(shape))
    if whole is None:
        why = next(filter(None, scores.errors))
        raise NodeError(f"no prompt and seed has a score on both sides; the first fault: {why}")
    lines = [whole]
    for part in part_names(scores):
        values = torch.tensor([detail.get(part, math.nan) for detail in scores.details])
        line = compare(part, values.view(shape))
        lines += [line] if line is not None else []
    return lines


def diversities(
    pixels: UInt8[Tensor, "2 prompts seeds 3 h w"], known: Bool[Tensor, "2 prompts seeds"]
) -> list[Line]:
    """How diverse each side's images of a prompt are, prompt by prompt.

    Args:
        known: which of them are images.

    Returns:
        A comparison each of pixels and of SSIM; none where no prompt has two images of both sides.
    """
    both = known.all(0)
    found = []
    for name, measure in DIVERSITIES.items():
        values = torch.full((2, len(both), 1), math.nan)
        for prompt, there in enumerate(both):
            if int(there.sum()) > 1:
                values[:, prompt, 0] = torch.tensor([measure(p[prompt][there]) for p in pixels])
        line = compare(name, values)
        if line is not None:
            found.append(Line(line.name, line.means, line.interval))
    return found


# --- in words ------------------------------------------------------------------------------------


def verdict(lines: Sequence[Line], names: Sequence[str]) -> str:
    """What the numbers say, in a few sentences."""
    one, other = (f"{side} ({name})" for side, name in zip(SIDES, names, strict=True))
    line = lines[0]
    size = f"B - A in {line.name} is {line.difference:+.4g}"
    if line.interval is None:
        said = f"{size}, and one pair tells nothing yet."
    else:
        low, high = line.interval
        better, worse = (other, one) if low > 0 else (one, other)
        told = f"{better} scores higher than {worse}"
        if low <= 0 <= high:
            told = f"{other} and {one} cannot be told apart"
        said = f"{told}: {size} (95%: {low:+.4g} to {high:+.4g})."
    if line.wins is not None:
        rate = line.wins.rate
        share = f"{rate.value:.0%}; 95%: {rate.low:.0%} to {rate.high:.0%}"
        said += f" B wins {line.wins} ({share})."
    return said + _of_diversity(lines)


def _of_diversity(lines: Sequence[Line]) -> str:
    """Whether one side's images of a prompt are more alike; empty where that cannot be told."""
    for line in lines:
        if line.name in DIVERSITIES and line.interval is not None:
            low, high = line.interval
            one, other = map(_number, line.means)
            if high < 0 or low > 0:
                word = "less" if high < 0 else "more"
                return f" B is {word} diverse: {line.name} {other} against {one}."
    return ""


def table(
    names: Sequence[str],
    lines: Sequence[Line],
    prompts: Sequence[str],
    scores: Values,
    errors: Sequence[str | None],
) -> str:
    """All numbers as Markdown: overall, then by prompt.

    Args:
        errors: why an image has no score; empty where all have.
    """
    heads = [f"{side}: {name}" for side, name in zip(SIDES, names, strict=True)]
    top = ["", *heads, "B - A", "95% interval", "B wins", "95% interval"]
    rows: list[list[str]] = []
    for i, prompt in enumerate(prompts):
        line = compare(prompt, scores[:, i : i + 1])
        cells = [NONE] * 3 if line is None else [*map(_number, line.means), str(line.wins)]
        rows.append([prompt, *cells])
    is_diverse = any(line.name in DIVERSITIES for line in lines)
    notes = [HOW, DIVERSITY if is_diverse else NO_DIVERSITY, *_left_out(errors, scores)]
    tables = [markdown(top, [*map(_row, lines)], right=1)]
    tables.append(markdown(["prompt", *SIDES, "B wins"], rows, right=1))
    return "\n\n".join([verdict(lines, names), *(text.rstrip() for text in tables), *notes])


def _left_out(errors: Sequence[str | None], scores: Values) -> list[str]:
    """A sentence on images without a score, if there are any."""
    faults = [(i, why) for i, why in enumerate(errors) if why]
    if not faults:
        return []
    first, why = faults[0]
    rest, seed = divmod(first, scores.shape[2])
    side, prompt = divmod(rest, scores.shape[1])
    return [
        f"{len(faults)} of {scores.numel()} images have no score, and their pairs do not count; "
        f"the first is #{seed} of prompt {prompt + 1} of {SIDES[side]}: {why}"
    ]


def _row(line: Line) -> list[str]:
    spread, share, reach = NONE, NONE, NONE
    if line.interval is not None:
        spread = " to ".join(f"{end:+.4g}" for end in line.interval)
    if line.wins is not None:
        rate = line.wins.rate
        share, reach = f"{rate.value:.0%}", f"{rate.low:.0%} to {rate.high:.0%}"
    means = map(_number, line.means)
    return [line.name, *means, f"{line.difference:+.4g}", spread, share, reach]


def _number(value: float) -> str:
    return f"{value:.4g}"
