"""From images to rewards to advantages.

Rewards are computed while the next images are sampled where possible: a thread waits for a server's
answer and, beside a GPU, computes on the CPU any reward without a network. The numbers are the
same. The failure of a reward is raised when the rewards are collected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...pcpo import combine_advantages
from ...pcpo.finite import all_finite
from ...pcpo.rewards import Scores
from ..config.sections import AdvantageConfig
from ..distributed.processes import Processes
from ..finite import Diverged
from .method import advantage_of
from .rewards import Judges


@dataclass(slots=True)
class Scoring:
    """Images on their way to their rewards.

    Attributes:
        judges: the rewards.
        processes: of the run.
        prompts: of n images, over all processes.
        order: in which they are divided among processes.
        images: of this process's share, as far as they have come.
        asked: present or future scores of each part of them, by the rewards' indices.
    """

    judges: Judges
    processes: Processes
    prompts: Sequence[str]
    order: Sequence[int]
    images: list[UInt8[Tensor, "b 3 height width"]] = field(default_factory=list)
    asked: dict[int, list[Future[Scores]]] = field(default_factory=dict)

    @property
    def mine(self) -> list[int]:
        """This process's share of the order."""
        return self.processes.share(self.order)

    def see(self, images: UInt8[Tensor, "b 3 height width"]) -> None:
        """Take the next images of the share, on the CPU; padding after its last is left out."""
        first, judges = sum(map(len, self.images)), self.judges
        prompts = [self.prompts[i] for i in self.mine[first : first + len(images)]]
        self.images.append(images[: len(prompts)])
        for place in judges.ahead if prompts else ():
            ask = partial(judges.rewards[place].score, self.images[-1], prompts)
            self.asked.setdefault(place, []).append(_begun(ask, judges.turn))

    def rewards(self) -> Float[Tensor, "rewards n"]:
        """The rewards of all images, over all processes; `RewardError` if one fails."""
        with self.processes.agreed():
            none = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
            images = torch.cat(self.images) if self.images else none
            asked = {place: partial(_joined, parts) for place, parts in self.asked.items()}
            own = self.judges.score(images, [self.prompts[i] for i in self.mine], asked)
        return self.processes.gathered(own, self.order).T


def _begun(work: Callable[[], Scores], turn: threading.Lock) -> Future[Scores]:
    """Start work in a daemon thread that waits for its turn; a stopped run can end without it."""
    future = Future[Scores]()

    def do() -> None:
        with turn:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=do, name="pcpo-reward", daemon=True).start()
    return future


def _joined(parts: Sequence[Future[Scores]]) -> Scores:
    return Scores.joined([part.result() for part in parts])


@dataclass(frozen=True, slots=True)
class Advantages:
    """How much better than expected each image is.

    Attributes:
        judges: the rewards, with their weights and scales.
        combine: "rewards" or "advantages": which of the two is summed over the rewards.
        kinds: one for the rewards' sum, or one per reward.
    """

    judges: Judges
    combine: str
    kinds: list[Any]

    @classmethod
    def of(cls, config: AdvantageConfig, judges: Judges) -> Advantages:
        count = 1 if config.combine == "rewards" else len(judges.rewards)
        return cls(judges, config.combine, [advantage_of(config) for _ in range(count)])

    def __call__(
        self, rewards: Float[Tensor, "rewards b"], prompts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """The images' advantages; `Diverged` if a float cannot hold one."""
        scaled = self.judges.trained(rewards)
        if self.combine == "advantages":
            weights = list(self.judges.weights)
            advantages = combine_advantages(self.kinds, list(scaled), weights, list(prompts))
        else:
            advantages = self.kinds[0](self.judges.added(scaled), list(prompts))
        if not all_finite([advantages]):
            raise Diverged(
                "the advantages are not finite: the rewards, times their weights and scales, are "
                "too large; lower rewards.NAME.weight or .scale, or set normalise to 'z_score'"
            )
        return advantages
