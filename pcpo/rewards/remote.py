"""A reward on a server: another process, environment or machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import quote

from ..errors import RewardUnavailable
from ..pictures.tensors import Images, pictures_of
from ..remote import protocol
from ..remote.http import Link, WebError, checked_link, checked_url
from ..scores import Scores
from .base import BatchReward

if TYPE_CHECKING:
    from ..remote.messages import Description, Health

KEY = "PCPO_REWARDS"
"""PCPO_REWARDS_KEY is sent to the server at PCPO_REWARDS_URL, and to no other."""

REMEMBERED = 10_000
"""Prompts whose complaints are kept."""

FRAME_BYTES = 64
"""Most bytes of a request around an image and its prompt."""

TOO_LARGE = "the image and its prompt are {} bytes as sent, more than the server takes"
TOO_MANY = "the image has {} pixels, more than the server takes"
TOO_LONG = "the prompt is longer than the server takes"

Said = TypeVar("Said")


@dataclass(frozen=True)
class Remote(BatchReward):
    """A reward of a server (the command rewards serve); nothing is asked before it is needed.

    What the server says of the reward (whether it needs a prompt, its bounds, its fingerprint) is
    asked once. A request that fails is tried again; a server that is gone stops the scoring.

    Attributes:
        url: address of the server.
        reward: its name on the server; may be empty if the server has only one.
        timeout_seconds: longest wait for an answer.
        retries: tries after the first one, with growing pauses.

    Raises:
        ValueError: where an option cannot be one.
    """

    name: ClassVar[str] = "remote"
    at_once: ClassVar[int] = protocol.BATCH
    is_elsewhere: ClassVar[bool] = True
    server: ClassVar[str] = KEY
    url: str = f"http://127.0.0.1:{protocol.PORT}"
    reward: str = ""
    timeout_seconds: float = 120.0
    retries: int = 3
    _known: dict[str, str | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        checked_link(self.timeout_seconds, self.retries)
        object.__setattr__(self, "url", checked_url(self.url))
        if not isinstance(self.reward, str):
            raise ValueError(f"reward is {self.reward!r}; give the name of a reward of the server")

    @cached_property
    def health(self) -> Health:
        """What the server offers.

        Raises:
            RewardUnavailable: if it cannot be reached, or lacks the reward.
        """
        from ..remote.messages import Health

        health = self._ask("/health", None, Health.read)
        is_there = self.reward in health.rewards if self.reward else len(health.rewards) == 1
        if not is_there:
            raise RewardUnavailable(
                f"the reward server at {self.url} has {', '.join(health.rewards)}; set the option "
                f"'reward' (now {self.reward!r}) of the reward 'remote' to one of them"
            )
        return health

    @cached_property
    def description(self) -> Description:
        from ..remote.messages import Description

        return self._ask(self._path(), None, Description.read)

    @property
    def needs_prompt(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.description.needs_prompt

    @property
    def bounds(self) -> tuple[float, float]:  # pyright: ignore[reportIncompatibleVariableOverride]
        low, high = self.description.bounds
        return -inf if low is None else low, inf if high is None else high

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.description.unit

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on: the fingerprint of the reward there."""
        return {"reward": self.name, "served": dict(self.description.fingerprint)}

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        """Why the server cannot score a prompt; it is asked once for each."""
        from ..remote.messages import Complaints

        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._known))
        if len(self._known) + len(new) > REMEMBERED:
            self._known.clear()
            new = list(dict.fromkeys(prompts))
        self._known.update(dict.fromkeys(new, TOO_LONG))
        for part in self._parts([_size(prompt) for prompt in new]):
            asked = [new[i] for i in part]
            body, path = {"prompts": asked}, self._path("/complaints")
            said = self._ask(path, body, partial(Complaints.read, count=len(asked)))
            self._known.update(zip(asked, said.complaints, strict=True))
        return [self._known[prompt] for prompt in prompts]

    def measure(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Have the server score the images, in as many requests as its limits require."""
        from ..remote.messages import Answer

        files = [protocol.encode_picture(picture) for picture in pictures_of(images)]
        sizes = [len(file) + _size(prompt) for file, prompt in zip(files, prompts, strict=True)]
        pixels = images.shape[-2] * images.shape[-1]
        if pixels > self.health.limits.pixels:
            return protocol.failed_scores([TOO_MANY.format(pixels)] * len(prompts))
        scores = protocol.failed_scores([TOO_LARGE.format(size) for size in sizes])
        for part in self._parts(sizes, pixels):
            body = {"images": [files[i] for i in part], "prompts": [prompts[i] for i in part]}
            said = self._ask(self._path("/score"), body, partial(Answer.read, count=len(part)))
            scores = protocol.put_scores(scores, part, said.scores())
        return scores

    def _parts(self, sizes: Sequence[int], pixels: int = 1) -> Iterator[list[int]]:
        """Group rows into requests; what is too large for one is left out."""
        most = min(self.health.limits.batch, self.health.limits.pixels // pixels)
        part, total = [], FRAME_BYTES
        for row, size in enumerate(sizes):
            if size + FRAME_BYTES > self.health.limits.request_bytes:
                continue
            full = len(part) >= most
            if part and (full or total + size + FRAME_BYTES > self.health.limits.request_bytes):
                yield part
                part, total = [], FRAME_BYTES
            part.append(row)
            total += size + FRAME_BYTES
        if part:
            yield part

    def _path(self, what: str = "") -> str:
        return f"/rewards/{quote(self.reward or self.health.rewards[0], safe='')}{what}"

    def _ask(self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Said]) -> Said:
        link = Link(self.timeout_seconds, protocol.ANSWER_BYTES, self.retries, KEY)
        try:
            return read(link.ask(self.url + path, body))
        except (WebError, protocol.WireError) as error:
            raise RewardUnavailable(
                f"the reward server at {self.url} cannot be used: {error}; see that "
                "this pack's command rewards serve runs there, or set the option 'url' of the "
                "reward 'remote'"
            ) from error


def _size(prompt: str) -> int:
    """Bytes of a prompt as it is sent."""
    return len(json.dumps(prompt))
