"""What a page needs to vote: the next pair, a vote, undo, and how well the taste knows its owner.

One desk serves all windows of a process; others may vote in the same folder at once. Everything
that it takes and gives is of JSON's plain types. The head is fitted anew, and pairs are drawn, in
a thread, so that nobody waits for it while pairs are left.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

from ..errors import UserError
from .learn import draw, ranked, refit, summary
from .store import HEAD, Pair, Store, TasteError

ROUND, LOW = 8, 4
"""Pairs that are drawn at once, and how few may be left before that."""
LENT_S = 60.0
"""How long a pair that one window shows is not shown by another."""


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
        self._worker = ThreadPoolExecutor(1, "pcpo-taste")
        self._round: Future[None] | None = None
        self._fault = ""

    def next(self, window: str) -> dict[str, Any]:
        """The state, with the "pair" to show in this window; None if there is no more.

        Args:
            window: any text by which a page is told from others.
        """
        pair = self._free(window, LOW)
        if pair is None:  # all that is left is lent, or still being drawn
            if self._round is not None:
                self._round.result()
            pair = self._free(window, 0)
        if pair is not None:
            self._lent[pair.id] = (window, time.monotonic() + LENT_S)
        shown = pair and pair.model_dump(include={"id", "left", "right", "prompt", "source"})
        return {"pair": shown, **self.state()}

    def _free(self, window: str, low: int) -> Pair | None:
        with self._turn:
            waiting = self.store.waiting()
            if len(waiting) <= low and (self._round is None or self._round.done()):
                self._round = self._worker.submit(self._draw)
            now = time.monotonic()
            lent = {k for k, (who, until) in self._lent.items() if who != window and until > now}
            return next((pair for pair in waiting if pair.id not in lent), None)

    def _draw(self) -> None:
        """Fit what is new, and draw a round."""
        try:
            head = None
            if self.store.votes():
                head = self.fit()
            offers = self.store.offers()
            self.store.put(draw(self.store, offers, ROUND, head, random.Random(), **self.options))
            self._fault = ""
        except (UserError, OSError) as error:
            self._fault = str(error)

    def fit(self) -> Any:
        """Fit the head if there are new votes, and return it; None if they decide nothing."""
        from ...pcpo.rewards.taste import Head

        result, votes = self.store.result(), self.store.votes()
        if result.get("votes") == len(votes) and (self.store.root / HEAD).is_file():
            return Head.load(self.store.root / HEAD)
        if all(vote.choice in ("tie", "neither") for vote in votes):
            return None
        return refit(self.store, **self.options)

    def vote(self, pair: str, choice: str) -> dict[str, Any]:
        """Record a choice on the pair of this id, and return the vote."""
        return self.store.vote(self.store.pair(pair), choice).model_dump()

    def undo(self) -> dict[str, Any]:
        """Take back the last vote; "undone" is the vote, or None."""
        vote = self.store.undo()
        return {"undone": vote and vote.model_dump()}

    def state(self) -> dict[str, Any]:
        """Numbers and sentences to show beside a pair."""
        votes = self.store.votes()
        return {
            "votes": len(votes),
            "waiting": len(self.store.waiting()),
            "said": [*summary(self.store.result()), *([self._fault] if self._fault else [])],
            "last": [vote.model_dump() for vote in votes[:-9:-1]],
        }

    def ranking(self) -> dict[str, list[str]]:
        """Digests of the pictures that it now ranks first and last."""
        try:
            first, last = ranked(self.store)
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
