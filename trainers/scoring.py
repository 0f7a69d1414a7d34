"""Rewards of images that come bit by bit; those that can be are asked while the next are sampled.

A server's answer is waited for in a thread, as is, beside a GPU, what a reward without a network
computes on the CPU. The numbers are the same. Where a reward fails, that is told when the rewards
are asked for.
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

from ..pcpo.rewards import Scores
from .prepare import Setup
from .sampling import Request


@dataclass(slots=True)
class Scoring:
    """The images of some requests on their way to their rewards.

    Attributes:
        setup: the run.
        requests: n images, over all processes.
        order: in which they are shared out.
        images: of this process's share, as far as they have come.
        asked: what rewards said, or will say, of each part of them, by their places.
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
        """Of this process's share."""
        return [self.setup.prompts[self.requests[image].prompt] for image in self.mine]

    def see(self, images: UInt8[Tensor, "b 3 height width"]) -> None:
        """Take the next images of the share.

        Args:
            images: on the CPU; what comes after the share's last is left out.
        """
        first, judges = sum(map(len, self.images)), self.setup.judges
        prompts = self.prompts[first : first + len(images)]
        self.images.append(images[: len(prompts)])
        for place in judges.ahead if prompts else ():
            ask = partial(judges.rewards[place].score, self.images[-1], prompts)
            self.asked.setdefault(place, []).append(_begun(ask, judges.turn))

    def rewards(self) -> Float[Tensor, "rewards n"]:
        """Those of all requests, over all processes; `RewardError` where one fails."""
        with self.setup.processes.agreed():
            none = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
            images = torch.cat(self.images) if self.images else none
            asked = {place: partial(_joined, parts) for place, parts in self.asked.items()}
            own = self.setup.judges.score(images, self.prompts, asked)
        return self.setup.processes.gathered(own, self.order).T


def _begun(work: Callable[[], Scores], turn: threading.Lock) -> Future[Scores]:
    """Work that a thread does in its turn; one that would not keep a stopped run from its end."""
    found = Future[Scores]()

    def do() -> None:
        with turn:
            try:
                found.set_result(work())
            except BaseException as error:
                found.set_exception(error)

    threading.Thread(target=do, name="pcpo-reward", daemon=True).start()
    return found


def _joined(parts: Sequence[Future[Scores]]) -> Scores:
    return Scores.joined([part.result() for part in parts])
