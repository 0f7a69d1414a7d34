"""From votes to a head, and from a head to what to ask next."""

from __future__ import annotations

import hashlib
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ...remedies import command
from ..job.files import replace_file
from ..reading import named
from .store import HEAD, Offer, Pair, Store, TasteError, Vote

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ...pcpo.rewards.taste import Head

OUTCOMES = {"left": 1.0, "right": -1.0, "tie": 0.0, "neither": 0.0}
"""Of a vote. That neither is good says nothing of which is better, as a tie."""
CANDIDATES = 2000
"""Most pairs among which the informative ones are sought."""
WORTH = 0.02
"""A gain of agreement that is called worth more votes."""

# --- fitting -------------------------------------------------------------------------------------


def refit(
    store: Store, features: str | None = None, prior: str | None = None, **options: Any
) -> Head:
    """Fit a head to all votes, and write it and its record.

    Args:
        store: of the taste.
        features: name of the feature map; that of the last fit if None, at first "grid".
        prior: a reward that the head starts from, "" for none; that of the last fit if None.
        options: where the weights of the features' network are.

    Raises:
        TasteError: if the votes decide nothing.
    """
    from ...pcpo.rewards.taste import FEATURES, fit

    votes, before = store.votes(), store.result()
    features = str(before.get("features", "grid") if features is None else features)
    prior = str(before.get("prior", "") if prior is None else prior)
    if features not in FEATURES:
        there = ", ".join(FEATURES)
        again = command("taste", "fit", store.root, "--features", "NAME")
        raise TasteError(f"there are no features {features!r}; choose one of {there} by {again}")
    _check_votes(store, votes)
    prompts = _prompts(store, votes)
    numbers = described(store, prompts, features, prior, options)
    found = fit(numbers, _choices(votes, [*prompts]), features, prior)
    with store.writing(), replace_file(store.root / HEAD) as fresh:
        found.head.save(fresh)
    store.keep_result(
        {
            "time": time.time(),
            "head": found.head.digest,
            "features": features,
            "prior": prior,
            "votes": len(votes),
            "last": _last(votes),
            "choices": dict(Counter(vote.choice for vote in votes)),
            "random": sum(vote.random for vote in votes),
            "strength": found.strength,
            "agreed": found.right,
            "tested": found.tested,
            "curve": found.curve,
            "doubt": found.head.doubt,
            "notes": [*_notes(votes), *store.faults()],
        }
    )
    return found.head


def up_to_date(store: Store, **options: Any) -> Head:
    """The head of all votes by now, fitted anew if there are others than it was fitted to."""
    is_fitted = store.result().get("last") == _last(store.votes())
    return (is_fitted and head_of(store)) or refit(store, **options)


def head_of(store: Store) -> Head | None:
    """The head as it was fitted last; None if there is none that can be used here."""
    from ...pcpo.rewards.taste import Head, RewardUnavailable

    with suppress(RewardUnavailable):
        return Head.load(store.root / HEAD)
    return None


def _last(votes: Sequence[Vote]) -> str:
    """Changes with every vote and undo."""
    return f"{len(votes)} {votes[-1].id}" if votes else ""


def undecided(votes: Sequence[Vote]) -> str | None:
    """Why nothing can be learnt of votes; None if one of them decides."""
    if any(OUTCOMES[vote.choice] for vote in votes):
        return None
    return f"its {len(votes)} votes are all ties" if votes else "it has no votes yet"


def _check_votes(store: Store, votes: Sequence[Vote]) -> None:
    what = undecided(votes)
    if what is None:
        return
    if not votes and (faults := store.faults()):
        what += f" ({'; '.join(faults)})"
    ask = command("taste", "ask", store.root)
    raise TasteError(f"{named(store.root)} cannot be fitted: {what}; choose pictures with {ask}")


def _notes(votes: Sequence[Vote]) -> list[str]:
    """What is odd about the votes."""
    notes, decided = [], [v for v in votes if OUTCOMES[v.choice]]
    for side in ("left", "right"):
        if len(decided) >= 10 and all(vote.choice == side for vote in decided):
            notes.append(f"all {len(decided)} choices fell on the {side} picture")
    chosen = {(v.left, v.right) if v.choice == "left" else (v.right, v.left) for v in decided}
    both = sum((worse, better) in chosen for better, worse in chosen) // 2
    if both:
        notes.append(f"{both} pairs were decided both ways at different times; both ways count")
    return notes


def _choices(votes: Sequence[Vote], digests: Sequence[str]) -> Any:
    import torch

    from ...pcpo.rewards.taste import Choices

    place = {digest: i for i, digest in enumerate(digests)}
    return Choices(
        torch.tensor([[place[vote.left], place[vote.right]] for vote in votes]),
        torch.tensor([OUTCOMES[vote.choice] for vote in votes], dtype=torch.float64),
        torch.tensor([vote.random for vote in votes]),
    )


def _prompts(store: Store, votes: Sequence[Vote]) -> dict[str, str]:
    """The prompt of each picture voted on: that of its votes, or with which it was offered, since a
    pair of two prompts has none.
    """
    offered = {offer.image: offer.prompt for offer in store.offers()}
    found = {}
    for vote in votes:
        for digest in (vote.left, vote.right):
            found[digest] = vote.prompt or found.get(digest) or offered.get(digest, "")
    return found


def described(
    store: Store, prompts: dict[str, str], features: str, prior: str, options: dict[str, Any]
) -> Tensor:
    """Features of pictures, of which those computed before are read from the taste's cache.

    `prompts` has the prompt of each picture, by its digest; `TasteError` if one cannot be read, or
    the features' network is not there.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from ...pcpo.pictures.files import BadPicture, open_picture
    from ...pcpo.pictures.tensors import pixels_of
    from ...pcpo.rewards.taste import RewardUnavailable, described, features_of, prior_of

    source = f"{features} {prior} {options.get('weights') or ''}"
    file = store.root / "cache" / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.safetensors"
    keys = {d: hashlib.sha256(f"{d} {text}".encode()).hexdigest() for d, text in prompts.items()}
    try:
        known = load_file(file)
    except Exception:  # not there, or damaged: it is computed again
        known = {}
    new = [digest for digest in prompts if keys[digest] not in known]
    if new:
        try:
            maps = features_of(features, **options), prior_of(prior, options.get("folders", ()))
        except RewardUnavailable as error:
            raise TasteError(str(error)) from error
        for digest in new:
            try:
                pixels = pixels_of(open_picture(store.image_file(digest)))
            except BadPicture as error:
                path = store.image_file(digest)
                raise TasteError(f"{path} cannot be read ({error}); delete it") from error
            found = described(pixels, [prompts[digest]], *maps)[0]
            known[keys[digest]] = found.contiguous()
        with store.writing(), replace_file(file) as fresh:
            save_file(known, fresh)
    return torch.stack([known[keys[digest]] for digest in prompts])


# --- what is known -------------------------------------------------------------------------------


def summary(result: dict[str, Any]) -> list[str]:
    """What a taste knows, in sentences, from its record."""
    if not result:
        return ["it was not fitted yet"]
    lines = [f"fitted to {result['votes']} votes, {result['random']} of them on random pairs"]
    lines += agreement(result)
    if len(curve := result["curve"]) > 1:
        lines.append(", ".join(f"{share:.0%} after {votes} votes" for votes, share in curve))
        lines.append(more_votes(curve))
    return [*lines, *result["notes"]]


def agreement(result: dict[str, Any]) -> list[str]:
    """How well a taste knows its owner, in sentences, from its record."""
    from ...pcpo.statistics import win_rate

    lines = []
    if count := result.get("tested"):
        rate = win_rate(result["agreed"], count - result["agreed"])
        lines.append(
            f"agrees with you on {rate.value:.0%} of {count} random pairs "
            f"({rate.low:.0%} to {rate.high:.0%})"
        )
    return [*lines, *([result["doubt"]] if result.get("doubt") else [])]


def more_votes(curve: Sequence[tuple[int, float]]) -> str:
    """What more votes would bring: at most what the last doubling did."""
    votes, now = curve[-1]
    half = next(share for count, share in reversed(curve[:-1]) if 2 * count <= votes or count == 25)
    if now - half < WORTH:
        return "the last votes changed little: more of the same kind would bring little"
    return f"twice the votes would bring at most about {now - half:.0%} more"


def ranked(store: Store, count: int = 8, **options: Any) -> tuple[list[str], list[str]]:
    """Digests of the offered pictures that the head likes best and least, in order.

    Args:
        store: of the taste.
        count: how many of each at most.
        options: where the weights of the features' network are.
    """
    offers, head = {offer.image: offer.prompt for offer in store.offers()}, head_of(store)
    if not offers or head is None:
        return [], []
    scores = head.score(head.z(described(store, offers, head.features, head.prior, options)))
    order = [digest for _, digest in sorted(zip(scores.tolist(), offers, strict=True))]
    return order[::-1][:count], order[:count]


# --- asking --------------------------------------------------------------------------------------


def ask(
    store: Store,
    pictures: Sequence[Image],
    prompts: Sequence[str],
    source: str,
    count: int,
    head: Head | None,
    chance: random.Random,
    **options: Any,
) -> int:
    """Offer pictures, and put pairs of those of this source up for votes.

    Args:
        store: of the taste.
        pictures: to offer.
        prompts: one for each.
        source: says where they are from.
        count: of the pairs.
        head: see `draw`.
        chance: likewise.
        options: likewise.

    Returns:
        The number of pairs.
    """
    store.offer(pictures, prompts, source)
    offers = [offer for offer in store.offers() if offer.source == source]
    pairs = draw(store, offers, count, head, chance, **options)
    store.put(pairs)
    return len(pairs)


def draw(
    store: Store,
    offers: Sequence[Offer],
    count: int,
    head: Head | None,
    draw: random.Random,
    *,
    is_across: bool = False,
    **options: Any,
) -> list[Pair]:
    """Pairs to vote on, no picture twice: half of them at random, half as the head would learn most
    from.

    Pictures of one prompt are compared, if a prompt has two; no pair is asked twice.

    Args:
        store: that knows what was asked.
        offers: the pictures.
        count: of the pairs; fewer where there are no more.
        head: of the taste; all are random if None.
        draw: the source of chance.
        is_across: compare pictures of any prompts.
        options: where the weights of the features' network are.
    """
    import torch

    from ...pcpo.rewards.taste import informative

    asked = {frozenset((pair.left, pair.right)) for pair in store.asked()}
    candidates = _candidates(offers, draw, is_across)
    pairs = [pair for pair in candidates if frozenset(pair) not in asked]
    chosen: list[tuple[str, str, bool]] = []
    taken: set[str] = set()

    def take(pair: tuple[str, str], *, is_random: bool) -> None:
        left, right = draw.sample(pair, 2)
        chosen.append((left, right, is_random))
        taken.update(pair)

    for pair in pairs:
        if len(chosen) < (count if head is None else -(-count // 2)) and not taken & {*pair}:
            take(pair, is_random=True)
    rest = [pair for pair in pairs if not taken & {*pair}]
    if head is not None and rest:
        prompts = {o.image: o.prompt for o in offers if any(o.image in pair for pair in rest)}
        place = {digest: i for i, digest in enumerate(prompts)}
        rows = torch.tensor([[place[a], place[b]] for a, b in rest])
        z = head.z(described(store, prompts, head.features, head.prior, options))
        for row in informative(z, head, rows, count - len(chosen)):
            take(rest[row], is_random=False)
    about = {offer.image: offer for offer in offers}
    return [
        Pair(left=a, right=b, random=r, source=about[a].source, prompt=_prompt(about[a], about[b]))
        for a, b, r in chosen
    ]


def _prompt(one: Offer, other: Offer) -> str:
    return one.prompt if one.prompt == other.prompt else ""


def _candidates(
    offers: Sequence[Offer], draw: random.Random, is_across: bool
) -> list[tuple[str, str]]:
    """Pairs of pictures in random order: of one prompt, or of any if no prompt has two."""
    groups: dict[str, dict[str, None]] = {}
    for offer in offers:
        groups.setdefault(offer.prompt, {})[offer.image] = None
    within = [[*group] for group in groups.values() if len(group) > 1 and not is_across]
    within = within or [[*dict.fromkeys(offer.image for offer in offers)]]
    if sum(len(group) * (len(group) - 1) // 2 for group in within) <= CANDIDATES:
        pairs = [pair for group in within for pair in combinations(group, 2)]
        draw.shuffle(pairs)
        return pairs
    weights = [len(group) * (len(group) - 1) for group in within]
    groups_drawn = draw.choices(within, weights, k=CANDIDATES)
    drawn = (sorted(draw.sample(group, 2)) for group in groups_drawn)
    return [*dict.fromkeys((one, other) for one, other in drawn)]
