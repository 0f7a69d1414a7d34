"""The rate of wins among choices between two, with Wilson's interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of choices.

    Attributes:
        value: from 0 to 1.
        low: lower end of its interval.
        high: upper end.
        count: of the choices.
    """

    value: float
    low: float
    high: float
    count: int


def win_rate(wins: int, losses: int, ties: int = 0, confidence: float = 0.95) -> Rate:
    """How often one of two is preferred; a tie counts as half a win.

    The interval (Wilson 1927) is right for few choices and for rates near 0 and 1, where the rate
    plus and minus two deviations is not. With ties it is a little wider than necessary.

    >>> found = win_rate(8, 2)
    >>> found.value, round(found.low, 3), round(found.high, 3)
    (0.8, 0.49, 0.943)

    Args:
        wins: choices of the one.
        losses: choices of the other.
        ties: choices of neither.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: if there is no choice, a negative number, or no such confidence.
    """
    count = wins + losses + ties
    if min(wins, losses, ties) < 0 or count == 0:
        raise ValueError(f"{wins} wins, {losses} losses and {ties} ties are no choices to count")
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence is {confidence}; give one between 0 and 1, such as 0.95")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = (wins + ties / 2) / count
    middle = (rate + z * z / (2 * count)) / (1 + z * z / count)
    reach = z * math.sqrt(rate * (1 - rate) / count + (z / (2 * count)) ** 2) / (1 + z * z / count)
    return Rate(rate, max(0.0, middle - reach), min(1.0, middle + reach), count)
