"""From log ratio and advantage to the loss of each sample, and to what was clipped.

All objectives take log rho (b,) and advantages A (b,) and are to be averaged over the batch. A
term is CLIPPED where A != 0 and it has no gradient any more: sign(A) log rho > xi (LogHinge) or
sign(A) (rho - 1) > xi (the others). At the boundary itself `clamp` still passes the gradient, as
PPO's does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Rows = Float[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class Terms:
    """One objective's terms.

    Attributes:
        loss: the term of each sample.
        clipped: whether the sample has lost its gradient.
        outside: whether |rho - 1| exceeds the clip range on its side, whatever A's sign: what the
            baselines log as their clip fraction.
    """

    loss: Rows
    clipped: Bool[Tensor, " b"]
    outside: Bool[Tensor, " b"]


@dataclass(frozen=True, slots=True)
class ClipRange:
    """How far the ratio may move before a sample stops pulling.

    Attributes:
        low: xi for A < 0, > 0; 1e-4 in every published setting.
        high: xi for A > 0, > 0.
    """

    low: float = 1e-4
    high: float = 1e-4

    def of(self, advantages: Rows) -> Rows:
        """The range that applies to each sample."""
        low, high = advantages.new_tensor(self.low), advantages.new_tensor(self.high)
        return torch.where(advantages < 0, low, high)

    def outside(self, log_ratio: Rows) -> Bool[Tensor, " b"]:
        """Whether rho is outside [1 - low, 1 + high]."""
        excess = torch.expm1(log_ratio.detach())
        return (excess > self.high) | (excess < -self.low)


@dataclass(frozen=True, slots=True)
class PpoClip:
    """max(-A rho, -A clip(rho, 1 - xi, 1 + xi)) (paper Eq. 1; Schulman et al. 2017, eq. 7)."""

    clip: ClipRange = ClipRange()

    def __call__(self, log_ratio: Rows, advantages: Rows) -> Terms:
        """The terms of a batch."""
        ratio = log_ratio.exp()
        kept = ratio.clamp(1 - self.clip.low, 1 + self.clip.high)
        moved, held = -advantages * ratio, -advantages * kept
        clipped = (held > moved).detach()  # in the loss's own arithmetic: it has no gradient there
        return Terms(torch.maximum(moved, held), clipped, self.clip.outside(log_ratio))


@dataclass(frozen=True, slots=True)
class Hinge:
    """|A| max(0, xi - sign(A) (rho - 1)): PPO's gradient as a hinge (paper Eq. 2).

    Equal to PPO's loss + A + xi |A| (Huang et al. 2024).
    """

    clip: ClipRange = ClipRange()

    def __call__(self, log_ratio: Rows, advantages: Rows) -> Terms:
        """The terms of a batch."""
        return _hinge(torch.expm1(log_ratio), log_ratio, advantages, self.clip)


@dataclass(frozen=True, slots=True)
class LogHinge:
    """|A| max(0, xi - sign(A) log rho): PCPO's objective, no exponential (paper Eq. 3).

    Its gradient is PPO's divided by rho, equal at rho = 1.
    """

    clip: ClipRange = ClipRange()

    def __call__(self, log_ratio: Rows, advantages: Rows) -> Terms:
        """The terms of a batch."""
        return _hinge(log_ratio, log_ratio, advantages, self.clip)


def _hinge(moved: Rows, log_ratio: Rows, advantages: Rows, clip: ClipRange) -> Terms:
    margin = clip.of(advantages) - advantages.sign() * moved
    loss = advantages.abs() * margin.clamp(min=0)
    return Terms(loss, (advantages != 0) & (margin.detach() < 0), clip.outside(log_ratio))


def slope_on_policy(
    objective: Callable[[Rows, Rows], Terms], advantages: Rows
) -> tuple[Rows, Rows]:
    """The slope of the loss in log rho before anything has moved, where rho = 1.

    With a clip range above 0 nothing is clipped there, and every objective here has the slope -A.

    >>> slope_on_policy(LogHinge(), torch.tensor([2.0, -1.0]))[0]
    tensor([-2.,  1.])

    Args:
        objective: the clipped objective.
        advantages: of each sample.

    Returns:
        d loss / d log rho at log rho = 0, and the loss there.
    """
    with torch.enable_grad():
        log_ratio = torch.zeros_like(advantages, requires_grad=True)
        loss = objective(log_ratio, advantages).loss
        (slope,) = torch.autograd.grad(loss.sum(), log_ratio)
    return slope, loss.detach()
