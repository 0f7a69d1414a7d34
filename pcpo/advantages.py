"""From rewards to advantages: how much better than expected each image is.

Every kind maps rewards (b,) and the prompt of each image to advantages (b,), clipped to
+-`limit`. It needs all images of an iteration at once, from every process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, " b"]


def _normalise(
    rewards: Rows,
    known: Rows,
    limit: float,
    *,
    ddof: int,
    offset: float,
    spread: Rows | None = None,
) -> Rows:
    """Rewards minus the mean of `known`, over the deviation of `spread` (`known` if None).

    In float64: in float32 the mean of equal rewards is off by a rounding error, which the tiny
    offset would blow up to an advantage.
    """
    known = known.double()
    std = _std(known if spread is None else spread.double(), ddof) + offset
    advantages = ((rewards.double() - known.mean()) / std).clamp(-limit, limit)
    return advantages.to(rewards.dtype)


def _by_prompt(prompts: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(i)
    return rows


def _std(values: Tensor, ddof: int) -> Tensor:
    """Standard deviation; 0 if there are too few values."""
    return values.std(correction=ddof) if len(values) > ddof else values.new_zeros(())


@dataclass(frozen=True, slots=True)
class BatchAdvantage:
    """(r - mean) / (std + offset) over all images of the iteration (DDPO without a tracker).

    Attributes:
        offset: added to the standard deviation; 1e-8 in DDPO.
        ddof: 0 for the population's, 1 for the sample's standard deviation.
        limit: advantages are clipped to +-limit.
    """

    offset: float = 1e-8
    ddof: int = 0
    limit: float = 5.0

    def __call__(self, rewards: Rows, prompts: Sequence[str]) -> Rows:
        """Advantages of an iteration's images."""
        return _normalise(rewards, rewards, self.limit, ddof=self.ddof, offset=self.offset)


@dataclass(frozen=True, slots=True)
class GroupAdvantage:
    """(r - mean of the prompt's group) / (std of the group + offset) (GRPO; DanceGRPO).

    Attributes:
        offset: added to the standard deviation; 1e-8 in DanceGRPO, 1e-4 in Flow-GRPO.
        ddof: 1 in DanceGRPO, 0 in Flow-GRPO.
        limit: advantages are clipped to +-limit.
        global_std: divide by the standard deviation of ALL rewards (Flow-GRPO's default).
    """

    offset: float = 1e-8
    ddof: int = 1
    limit: float = 5.0
    global_std: bool = False

    def __call__(self, rewards: Rows, prompts: Sequence[str]) -> Rows:
        """Advantages of an iteration's images, grouped by equal prompts."""
        advantages = torch.empty_like(rewards)
        for rows in _by_prompt(prompts).values():
            group = rewards[rows]
            spread = rewards if self.global_std else None
            advantages[rows] = _normalise(
                group, group, self.limit, ddof=self.ddof, offset=self.offset, spread=spread
            )
        return advantages


@dataclass(slots=True)
class RunningAdvantage:
    """Statistics of each prompt over its last images (DDPO's tracker; has state).

    A prompt seen fewer than `min_count` times uses the iteration's own mean and standard
    deviation, as DDPO does.

    Attributes:
        buffer_size: images remembered per prompt; 16 by default in DDPO, 32 in its aesthetic runs.
        min_count: images from which a prompt's own statistics are used.
        offset: added to the standard deviation, 1e-6 in DDPO.
        limit: advantages are clipped to +-limit.
    """

    buffer_size: int = 32
    min_count: int = 16
    offset: float = 1e-6
    limit: float = 5.0
    _seen: dict[str, deque[float]] = field(default_factory=dict)

    def __call__(self, rewards: Rows, prompts: Sequence[str]) -> Rows:
        """Advantages of an iteration's images; remembers their rewards."""
        advantages = torch.empty_like(rewards)
        for prompt, rows in _by_prompt(prompts).items():
            seen = self._seen.setdefault(prompt, deque(maxlen=self.buffer_size))
            seen.extend(rewards[rows].tolist())
            enough = len(seen) >= self.min_count
            known = torch.tensor(list(seen), dtype=torch.float64) if enough else rewards
            advantages[rows] = _normalise(
                rewards[rows], known, self.limit, ddof=0, offset=self.offset
            )
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        """The remembered rewards of each prompt, for a checkpoint."""
        return {prompt: list(seen) for prompt, seen in self._seen.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from a checkpoint's rewards."""
        self._seen = {p: deque(seen, maxlen=self.buffer_size) for p, seen in state.items()}


def combine_advantages(
    kinds: Sequence[Callable[[Rows, Sequence[str]], Rows]],
    rewards: Sequence[Rows],
    weights: Sequence[float],
    prompts: Sequence[str],
) -> Rows:
    """Normalise several rewards separately, then add them up (METHOD M5).

    To normalise the weighted sum of the rewards instead, call one kind once.

    Args:
        kinds: one advantage per reward; separate objects if they have state.
        rewards: (b,) of each reward.
        weights: one factor per reward.
        prompts: the prompt of each image.

    Returns:
        The weighted sum of the advantages.

    Raises:
        ValueError: if the numbers of kinds, rewards and weights differ.
    """
    if not len(kinds) == len(rewards) == len(weights):
        raise ValueError(
            f"{len(kinds)} advantages, {len(rewards)} rewards and {len(weights)} weights; "
            "give one of each for every reward"
        )
    parts = zip(kinds, rewards, weights, strict=True)
    return torch.stack([w * kind(r, prompts) for kind, r, w in parts]).sum(dim=0)
