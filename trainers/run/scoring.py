"""Rewards of images that come bit by bit, computed while the next are sampled where possible.

A thread waits for a server's answer and, beside a GPU, computes on the CPU any reward without a
network. The numbers are the same. The failure of a reward is raised when the rewards are collected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...pcpo.rewards import Scores
from .sampler import Request
from .setup import Setup


@dataclass(slots=True)
class Scoring:
    """The images of some requests on their way to their rewards.

    Attributes:
        setup: the run.
        requests: n images, over all processes.
        order: in which they are divided among processes.
        images: of this process's share, as far as they have come.
        asked: present or future scores of each part of them, by the rewards' indices.
    """

    setup: Setup
    requests: Sequence[Request]
    order: Sequence[int]
    images: list[UInt8[Tensor, "b 3 height width"]] = field(default_factory=list)
    asked: dict[int, list[Future[Scores]]] = field(default_factory=dict)

    @property
    def mine(self) -> list[int]:
        """This process's share of the order."""
        return self.setup.processes.share(self.order)

    @property
    def prompts(self) -> list[str]:
        """Prompts of this process's share."""
        return [self.setup.prompts[self.requests[image].prompt] for image in self.mine]

    def see(self, images: UInt8[Tensor, "b 3 height width"]) -> None:
        """Take the next images of the share, on the CPU; padding after its last is left out."""
        first, judges = sum(map(len, self.images)), self.setup.judges
        prompts = self.prompts[first : first + len(images)]
        self.images.append(images[: len(prompts)])
        for place in judges.ahead if prompts else ():
            ask = partial(judges.rewards[place].score, self.images[-1], prompts)
            self.asked.setdefault(place, []).append(_begun(ask, judges.turn))

    def rewards(self) -> Float[Tensor, "rewards n"]:
        """The rewards of all requests, over all processes; `RewardError` if one fails."""
        with self.setup.processes.agreed():
            none = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
            images = torch.cat(self.images) if self.images else none
            asked = {place: partial(_joined, parts) for place, parts in self.asked.items()}
            own = self.setup.judges.score(images, self.prompts, asked)
        return self.setup.processes.gathered(own, self.order).T


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
