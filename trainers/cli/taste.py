"""`pcpo taste`: collect votes, fit a head to them, and see how well it knows you."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ...registry import REWARDS
from ...remedies import command
from ..config.arguments import POSITIONAL, Arguments, Word, Words, parse
from ..config.train_config import ConfigError
from ..taste.store import Store, TasteError


class TasteArguments(Arguments):
    """Teach a reward your own taste: choose between pictures, and train on what it learnt."""

    what: Annotated[
        Literal["new", "import", "ask", "fit", "show", "rank", "export", "delete"], POSITIONAL
    ] = Field(
        description="new: make an empty taste; import: add votes made elsewhere; ask: open a page "
        "to vote on; fit: fit the head to all votes; show: what it knows of you; rank: order "
        "pictures by it; export: copy votes and pictures; delete: remove it with its pictures"
    )
    folder: Word = Field(description="folder of the taste")
    things: Words = Field(
        default=[],
        description="import, from a page of the command preference: the files that it saved; ask "
        "and rank: folders of pictures (their prompts in a prompts.json); export: the target",
    )
    liked: str | None = Field(default=None, description="import: folder of pictures you like")
    disliked: str | None = Field(
        default=None, description="import: folder of pictures you do not like"
    )
    stars: str | None = Field(
        default=None, description="import: CSV with the columns file, stars (1 to 5), prompt"
    )
    page: str | None = Field(
        default=None, description="import: folder of a page of the command preference"
    )
    features: str | None = Field(
        default=None,
        description="fit: 'grid' (colour, light, detail; nothing to download), 'clip_l' (CLIP "
        "ViT-L/14), 'clip_l+prompt' (with how a picture fits its prompt), 'siglip' (So400m/14) or "
        "'dinov2' (ViT-L/14); if not set, those of the last fit",
    )
    weights: str | None = Field(
        default=None,
        description="fit, ask, rank: weight file of the features' network; searched if not set",
    )
    prior: str | None = Field(
        default=None,
        description="fit: a reward that people in general agree with (aesthetic, pick_score), "
        "from which the head learns how you differ; '' for none",
    )
    port: int = Field(default=0, ge=0, le=65535, description="ask: port; 0 takes a free one")
    yes: bool = Field(default=False, description="delete: do not ask")


def main(arguments: list[str]) -> int:
    """Make, fill, fit, show or delete a taste."""
    a = parse(TasteArguments, arguments, "pcpo taste")
    if a.what == "new":
        print(f"{Store.new(a.folder).root} is a new taste; vote with {_ask(a)}")
        return 0
    from ...pcpo.rewards import RewardUnavailable

    work = {"import": _import, "ask": _vote, "fit": _fit, "show": _show, "rank": _rank}
    work |= {"export": _export, "delete": _delete}
    try:
        return work[a.what](a, Store(a.folder))
    except RewardUnavailable as error:
        raise ConfigError(str(error)) from error


def _ask(a: TasteArguments) -> str:
    return command("taste", "ask", a.folder, "PICTURES")


def _import(a: TasteArguments, store: Store) -> int:
    from ..taste import bring

    if a.liked and a.disliked:
        count = bring.from_folders(store, Path(a.liked), Path(a.disliked))
    elif a.stars:
        count = bring.from_stars(store, Path(a.stars))
    elif a.page and a.things:
        count = bring.from_preference(store, Path(a.page), [Path(file) for file in a.things])
    else:
        raise ConfigError("give --liked and --disliked, or --stars, or --page and what it saved")
    print(f"{count} votes imported; fit them with {command('taste', 'fit', a.folder)}")
    return 0


def _offer(a: TasteArguments, store: Store) -> None:
    """Offer the pictures of folders, and of runs the samples."""
    from ..evaluate.sides import images_of
    from ..taste.bring import opened

    for folder in map(Path, a.things):
        by_prompt = images_of(folder)
        files = [(file, prompt) for prompt, files in by_prompt.items() for file in files]
        pictures = [opened(file, file) for file, _ in files]
        store.offer(pictures, [prompt for _, prompt in files], folder.resolve().name)


def _vote(a: TasteArguments, store: Store) -> int:
    from .taste_page import serve

    _offer(a, store)
    if len(store.offers()) < 2 and not store.waiting():
        raise ConfigError(f"there are no two pictures to choose from; give a folder: {_ask(a)}")
    serve(store, a.port, a.weights)
    return 0


def _fit(a: TasteArguments, store: Store) -> int:
    from ..taste.learn import refit

    if a.prior and a.prior not in REWARDS:
        raise ConfigError(f"--prior is {a.prior!r}; choose one of {', '.join(sorted(REWARDS))}")
    refit(store, a.features, a.prior, weights=a.weights)
    return _show(a, store)


def _show(a: TasteArguments, store: Store) -> int:
    from ..taste.learn import summary

    result, votes = store.result(), len(store.votes())
    print("\n".join([f"{store.root}", *(f"  {line}" for line in summary(result))]))
    if votes != result.get("votes", votes if result else None):
        print(f"  {votes} votes by now; fit them with {command('taste', 'fit', a.folder)}")
    return 0


def _rank(a: TasteArguments, store: Store) -> int:
    """Print scores, best first: of given pictures, or of those of the taste."""
    from ...pcpo.rewards.taste import Taste
    from ..taste.bring import opened, pictures_in

    taste = Taste(folder=str(store.root), weights=a.weights)
    files = [file for folder in a.things for file in pictures_in(Path(folder))]
    prompts = {store.image_file(offer.image): offer.prompt for offer in store.offers()}
    files = files or [*prompts]
    rows = []
    for file in files:
        scores = taste.score([opened(file, file)], [prompts.get(file, "")])
        if scores.errors:
            raise TasteError(f"{file} has no score: {scores.errors[0]}")
        rows.append((scores.values.item(), scores.details[0]["distance"], file))
    print(f"{'log odds':>9} {'distance':>9}  (beyond 1 it is unlike the pictures voted on)")
    for score, distance, file in sorted(rows, reverse=True):
        print(f"{score:9.2f} {distance:9.2f}  {file}")
    return 0


def _export(a: TasteArguments, store: Store) -> int:
    if len(a.things) != 1:
        raise ConfigError(f"give one folder to export to: {command('taste', 'export', a.folder)}")
    store.export(Path(a.things[0]))
    print(f"{len(store.votes())} votes and their pictures are in {a.things[0]}")
    return 0


def _delete(a: TasteArguments, store: Store) -> int:
    what = f"{store.root} with {len(store.votes())} votes and all its pictures"
    if not a.yes and input(f"delete {what}? [y/N] ").strip().lower() != "y":
        return 0
    store.delete()
    print(f"deleted {what}; runs that trained on it keep their heads, which hold no votes")
    return 0
