"""From images to pairs in a taste's queue, and from its votes to a reward."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from ...pcpo.pictures.tensors import pictures_of
from ...pcpo.rewards import RewardUnavailable
from ...pcpo.rewards.taste import too_small
from ...trainers.errors import UserError
from ...trainers.taste.learn import draw, head_of, summary, undecided, up_to_date
from ...trainers.taste.store import ABOUT, Offer, Store
from ..errors import NodeError
from ..jobs.access import public_text
from ..names import file_name
from ..rewards.make import NamedReward, remake, weight_folders
from ..rewards.score import faults, to_pixels
from .places import folder, names, new_taste, open_taste

NEWEST = "newest taste"
"""The choice of no taste in particular."""
SOURCE = "PCPO Rate Images"
"""Where the pairs came from, for the page."""


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the errors of a taste into one sentence."""
    try:
        yield
    except (UserError, RewardUnavailable) as error:  # sentences already
        raise NodeError(public_text(str(error))) from error
    except OSError as error:
        raise NodeError(public_text(f"the taste {name!r} failed: {error}")) from error


def where(name: str) -> str:
    """Where to vote."""
    return f"open the PCPO tab in the sidebar, page Taste, choose {name!r}, and vote"


# --- pictures to vote on -------------------------------------------------------------------------


def put(
    name: str, images: Float[Tensor, "b h w c"], prompts: Sequence[str], count: int
) -> tuple[int, str]:
    """Offer images to a taste, which is made if need be, and draw pairs of those that are new.

    Args:
        count: of the pairs at most.

    Returns:
        How many pairs wait, and the text to show.
    """
    name = file_name(name, "the taste name")
    pixels, why = to_pixels(images), faults(images)
    if said := too_small(pixels):
        raise NodeError(f"{said}; connect larger images")
    whole = [i for i, fault in enumerate(why) if fault is None]
    if not whole:
        raise NodeError(f"no image can be voted on: {why[0]}")
    with explained(name):
        store = open_taste(name) if name in names() else new_taste(name)
        before = {(offer.image, offer.prompt) for offer in store.offers()}
        pictures = [pictures_of(pixels[i : i + 1])[0] for i in whole]
        store.offer(pictures, [prompts[i] for i in whole], SOURCE)
        fresh = [o for o in store.offers() if (o.image, o.prompt) not in before]
        num_new = _ask(store, fresh, count)
        waiting = len(store.waiting())
        known = summary(store.result())
    new = f"{num_new} new pairs" if fresh else "these images were here before, so no pair is new"
    if len(store.offers()) < 2:
        new = "one image makes no pair, connect several"
    lines = [f"{new}; {waiting} wait: {where(name)}", *known]
    if len(whole) < len(why):
        lines.append(f"{len(why) - len(whole)} images are left out: they hold no colours")
    return waiting, "\n".join(lines)


def _ask(store: Store, fresh: list[Offer], count: int) -> int:
    """Draw pairs of new pictures, or of a single one and those of before; returns their number."""
    offers = fresh if len(fresh) > 1 else store.offers() if fresh else []
    head, chance, done = head_of(store), random.Random(), 0
    while done < count:  # of each draw no picture is in two pairs
        pairs = draw(store, offers, count - done, head, chance, folders=weight_folders())
        store.put(pairs)
        done += len(pairs)
        if not pairs:
            break
    return done


def age_of(name: str | None) -> str:
    """Tells a taste from one of its name that was deleted; empty if there is none."""
    with suppress(NodeError, OSError):
        return repr(open_taste(name or "").made)
    return ""


# --- the reward ----------------------------------------------------------------------------------


def chosen(name: str | None) -> Store:
    """The taste of a name, or for `NEWEST` the one that votes or pictures came into last."""
    there = names()
    if name == NEWEST and not there:
        raise NodeError("there is no taste yet; make one with PCPO Rate Images")
    if name == NEWEST:
        name = max(there, key=lambda each: _changed(folder() / each))
    return open_taste(name or "")


def _changed(root: Path) -> float:
    files = (root / name for name in (ABOUT, "votes.jsonl", "offers.jsonl"))
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def reward_of(store: Store) -> tuple[NamedReward, str]:
    """The reward that a taste's votes make, and what it knows; `NodeError` if they make none."""
    name, folders = store.root.name, weight_folders()
    with explained(name):
        if what := undecided(store.votes()):
            raise NodeError(f"the taste {name!r} knows nothing: {what}; {where(name)}")
        up_to_date(store, folders=folders)
        options = {"folder": str(store.root), "folders": folders}
        reward = remake("taste", json.dumps(options, sort_keys=True))
        known = summary(store.result())
    return reward, "\n".join([f"taste {name!r}", *known])


def sign_of(name: str | None) -> str:
    """Changes with a taste's votes and with what is read from its pictures; empty if there is none.

    The head itself is left out: it follows from these.
    """
    with suppress(NodeError, OSError):
        store = chosen(name)
        votes, fit = (store.root / "votes.jsonl").stat(), store.result()
        features = fit.get("features", "grid"), fit.get("prior", "")
        return repr((str(store.root), votes.st_mtime_ns, votes.st_size, features))
    return ""
