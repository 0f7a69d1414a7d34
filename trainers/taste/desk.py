"""What a page needs to vote: the next pair, a vote, undo, and how well the taste knows its owner.

One desk serves all windows of a process; others may vote in the same folder at once. Everything
that it takes and gives is of JSON's plain types. The head is fitted anew, and pairs are drawn, in
a thread, so that nobody waits for it while pairs are left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .learn import agreement, ask, draw, head_of, ranked, refit, summary, undecided
from .store import Pair, Store, TasteError

if TYPE_CHECKING:
    from PIL.Image import Image

ACTIONS = ("next", "vote", "undo")
"""What a page asks for."""
ROUND, LOW = 8, 4
"""Pairs that are drawn at once, and how few may be left before that."""
LENT_S = 60.0
"""How long a pair that one window shows is not shown by another."""
FRESH = 0.02
"""Share of new votes for which the head is fitted anew: fitting 10,000 takes seconds."""


@contextmanager
def noted(faults: list[str]) -> Iterator[None]:
    """Add an error's sentence to faults, and go on."""
    try:
        yield
    except (UserError, OSError) as error:
        faults.append(str(error))


class Desk:
    """A taste that is being voted on.

    Args:
        store: of the taste.
        options: where the weights of its features' network are.
    """

    def __init__(self, store: Store, **options: Any) -> None:
        self.store, self.options = store, options
        self._turn = Lock()
        self._lent: dict[str, tuple[str, float]] = {}
        self._cast: dict[str, str] = {}
        self._worker = ThreadPoolExecutor(1, "pcpo-taste")
        self._round: Future[None] | None = None
        self._fault = ""

    def act(self, action: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a page asks for, and say what it shows then, as `next` does.

        Args:
            action: one of `ACTIONS`; of "undo", "undone" is the vote, or None.
            asked: the "window", any text by which a page is told from others, and for a vote the
                "pair" and the "choice".
        """
        window, done = str(asked.get("window", "")), {}
        if action == "vote":
            self.vote(str(asked.get("pair", "")), str(asked.get("choice", "")), window)
        elif action == "undo":
            done = self.undo(window)
        return {**done, **self.next(window)}

    def next(self, window: str) -> dict[str, Any]:
        """The state, with the "pair" to show in this window; None if there is no more. "soon" has
        the pictures of the one after it."""
        found = self._free(window, LOW)
        if not found:  # all that is left is lent, or still being drawn
            if self._round is not None:
                self._round.result()
            found = self._free(window, 0)
        soon = [digest for pair in found[1:2] for digest in (pair.left, pair.right)]
        shown = found[0].model_dump(exclude={"time", "random"}) if found else None
        return {"pair": shown, "soon": soon, **self.state()}

    def _free(self, window: str, low: int) -> list[Pair]:
        """Pairs that this window may show, the one that it has shown first; that is lent to it."""
        with self._turn:
            waiting = self.store.waiting()
            if len(waiting) <= low or self._num_new() >= ROUND:
                self._work()
            now = time.monotonic()
            lent = {k for k, (who, until) in self._lent.items() if who != window and until > now}
            found = [pair for pair in waiting if pair.id not in lent]
            found.sort(key=lambda pair: -self._lent.get(pair.id, ("", 0.0))[1])
            if found:
                self._lent[found[0].id] = (window, now + LENT_S)
            return found

    def _num_new(self) -> int:
        """Votes since the last fit, if they are enough for another."""
        votes = len(self.store.votes())
        new = abs(votes - self.store.result().get("votes", 0))
        return new if new > FRESH * votes else 0

    def _work(self) -> None:
        """Have a head fitted and pairs drawn, if that is not under way."""
        if self._round is None or self._round.done():
            self._round = self._worker.submit(self._draw)

    def catch_up(self) -> None:
        """Have new votes fitted, for who looks at what the taste knows."""
        with self._turn:
            if self._num_new():
                self._work()

    def ask(
        self, pictures: Sequence[Image], prompts: Sequence[str], source: str, pairs: int
    ) -> int:
        """Offer pictures, and put pairs of them up for votes, as `learn.ask`; their number."""

        def work() -> int:
            head, chance, faults = None, random.Random(), list[str]()
            with noted(faults):
                head = self.fit() if self.store.votes() else None
            self._fault = faults[-1] if faults else self._fault
            return ask(self.store, pictures, prompts, source, pairs, head, chance, **self.options)

        return self._worker.submit(work).result()  # one at a time fits and draws

    def close(self) -> None:
        """Fit and draw no more."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _draw(self) -> None:
        """Fit what is new, and draw a round if few pairs are left, at random if there is no head to
        choose by."""
        head, faults = None, list[str]()
        with noted(faults):
            head = self.fit() if self.store.votes() else None
        with noted(faults):
            if len(self.store.waiting()) <= LOW:
                given = (self.store, self.store.offers(), ROUND, head, random.Random())
                pairs = draw(*given, **self.options)  # of one prompt, while there are any
                self.store.put(pairs or draw(*given, is_across=True, **self.options))

        self._fault = faults[-1] if faults else ""  # at the end: another thread reads it

    def fit(self) -> Any:
        """Fit the head if there are new votes, and return it; None if they decide nothing."""
        if not self._num_new() and (head := head_of(self.store)) is not None:
            return head
        if undecided(self.store.votes()):
            return None
        return refit(self.store, **self.options)

    def vote(self, pair: str, choice: str, window: str = "") -> dict[str, Any]:
        """Record a choice on the pair of this id, and return the vote."""
        vote = self.store.vote(self.store.pair(pair), choice)
        self._cast[vote.id] = window
        return vote.model_dump()

    def undo(self, window: str = "") -> dict[str, Any]:
        """Take back the last vote that no other window cast; "undone" is the vote, or None. Its
        pair is shown next."""
        vote = self.store.undo(lambda vote: self._cast.get(vote.id, window) == window)
        if vote is not None:
            with self._turn:
                self._lent[vote.pair] = (window, time.monotonic() + 2 * LENT_S)
        return {"undone": vote and vote.model_dump()}

    def state(self) -> dict[str, Any]:
        """Numbers and sentences to show beside a pair."""
        votes, result = self.store.votes(), self.store.result()
        return {
            "votes": len(votes),
            "waiting": len(self.store.waiting()),
            "offers": len(self.store.offers()),
            "images": self.store.count_images(),
            "head": result.get("head"),
            "knows": agreement(result),
            "said": [*summary(result), *([self._fault] if self._fault else [])],
            "curve": result.get("curve", []),
            "last": [vote.model_dump() for vote in votes[:-9:-1]],
        }

    def ranking(self) -> dict[str, list[str]]:
        """Digests of the pictures that it now ranks first and last."""
        try:
            first, last = ranked(self.store, **self.options)
        except (UserError, OSError):
            first, last = [], []
        return {"first": first, "last": last}

    def image(self, digest: str) -> bytes:
        """A picture, as PNG; `TasteError` if it is not there."""
        if len(digest) != 64 or not digest.isalnum():
            raise TasteError("this is no picture of a taste")
        try:
            return self.store.image_file(digest).read_bytes()
        except OSError as error:
            raise TasteError("the picture is gone; reload the page") from error
