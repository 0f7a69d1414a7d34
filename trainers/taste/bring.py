"""Votes made elsewhere: two folders, stars, and the choices of `pcpo preference`. No torch.

The same files bring the same votes: what is imported twice counts once.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..reading import named, no_file, parse_json, read_text
from .store import Choice, Store, TasteError, Vote

if TYPE_CHECKING:
    from PIL import Image

RIVALS = 4
"""Others that a picture is compared with."""
LARGEST = 1 << 30
"""Most bytes of a file."""
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; `TasteError` if there is none."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not found:
        raise TasteError(f"{named(folder)} holds no picture; give a folder of pictures")
    return found


def opened(file: Path | io.BytesIO, name: str | Path) -> Image.Image:
    """A picture as RGB; `TasteError` naming it if it cannot be read."""
    from ...pcpo.pictures.files import BadPicture, open_picture

    try:
        return open_picture(file)
    except BadPicture as error:
        raise TasteError(f"{named(name)} cannot be read as a picture ({error})") from error


def from_folders(store: Store, liked: Path, disliked: Path) -> int:
    """Each liked picture over some that are not; returns the number of votes."""
    good, bad = ([opened(f, f) for f in pictures_in(folder)] for folder in (liked, disliked))
    ratings = [(picture, 1.0) for picture in good] + [(picture, 0.0) for picture in bad]
    return _compared(store, [(*rating, "") for rating in ratings], "two folders", ties=False)


def from_stars(store: Store, file: Path) -> int:
    """Pictures with 1 to 5 stars, compared at random; returns the number of votes.

    Args:
        store: to bring them into.
        file: a CSV with the columns file (its path, from the CSV's folder), stars and, if wanted,
            prompt.

    Raises:
        TasteError: if a row cannot be used; nothing is imported then.
    """
    reader = csv.DictReader(io.StringIO(read_text(file, file.name, LARGEST)))
    if not {"file", "stars"} <= {*(reader.fieldnames or [])}:
        raise TasteError(f"{file.name} needs the columns file and stars in its first line")
    ratings = []
    for row in reader:
        where = f"{file.name} line {reader.line_num}"
        if row["stars"] not in ("1", "2", "3", "4", "5"):
            raise TasteError(f"{where}: stars is {row['stars']!r}; give 1, 2, 3, 4 or 5")
        path = file.parent / (row["file"] or "")
        if why := no_file(path):
            raise TasteError(f"{where}: {named(path)} {why}")
        ratings.append((opened(path, path), float(row["stars"]), row.get("prompt") or ""))
    if len({stars for _, stars, _ in ratings}) < 2:
        raise TasteError(f"{file.name}: all pictures have equal stars; nothing can be learnt")
    return _compared(store, ratings, file.name, ties=True)


def _compared(
    store: Store, ratings: Iterable[tuple[Image.Image, float, str]], source: str, *, ties: bool
) -> int:
    """Compare each picture with some others, drawn at random from all, or (without ties) from those
    rated otherwise; only the former are random pairs."""
    rated = {store.add_image(picture): (value, prompt) for picture, value, prompt in ratings}
    draw, votes = random.Random(0), dict[frozenset[str], Vote]()
    for one, (value, prompt) in rated.items():
        others = [d for d, (v, _) in rated.items() if d != one and (ties or v != value)]
        for other in draw.sample(others, min(RIVALS, len(others))):
            left, right = draw.sample((one, other), 2)
            better = rated[left][0] - rated[right][0]
            choice: Choice = "left" if better > 0 else "right" if better < 0 else "tie"
            about = prompt if prompt == rated[other][1] else ""
            vote = _vote(left, right, about, choice, source, is_random=ties)
            votes[frozenset((one, other))] = vote
    store.record([*votes.values()])
    return len(votes)


def _vote(
    left: str, right: str, prompt: str, choice: Choice, source: str, *, is_random: bool
) -> Vote:
    first, second = sorted((left, right))
    pair = hashlib.sha256(f"{first} {second} {prompt} {source}".encode()).hexdigest()[:32]
    return Vote(
        pair=pair,
        left=left,
        right=right,
        prompt=prompt,
        random=is_random,
        source=source,
        choice=choice,
    )


def from_preference(store: Store, page: Path, files: Sequence[Path]) -> int:
    """The choices that people saved from a page of `pcpo preference`; returns their number.

    Args:
        store: to bring them into.
        page: the folder with page.html, which holds the pictures.
        files: what the page saved.

    Raises:
        TasteError: if a file is of another page.
    """
    text = read_text(page / "page.html", "page.html", LARGEST)
    _, _, rest = text.partition('id="data">')
    data = parse_json(rest.partition("</script>")[0], "the data of page.html")
    votes = []
    for file in files:
        saved = parse_json(read_text(file, file.name, LARGEST), file.name)
        if not isinstance(saved, dict) or saved.get("page") != data["page"]:
            raise TasteError(f"{named(file)} is not of the page in {named(page)}")
        votes += _chosen(store, data["pairs"], saved.get("choices", {}), file.name)
    store.record(votes)
    return len(votes)


def _chosen(store: Store, pairs: list, choices: dict[str, str], source: str) -> Iterator[Vote]:
    for number, choice in choices.items():
        if (
            not number.isdecimal()
            or int(number) >= len(pairs)
            or choice
            not in (
                "left",
                "right",
                "tie",
            )
        ):
            raise TasteError(f"{source}: {choice!r} of pair {number!r} is no choice of this page")
        pair = pairs[int(number)]
        raw = [base64.b64decode(image.partition(",")[2]) for image in pair["images"]]
        left, right = (store.add_image(opened(io.BytesIO(data), source)) for data in raw)
        yield _vote(left, right, pair["prompt"], choice, source, is_random=True)
