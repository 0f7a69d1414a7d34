"""The tastes that this ComfyUI has open, and pairs of a job's samples for them."""

from __future__ import annotations

import io
from pathlib import Path
from threading import Lock

from ...trainers.job.folder import JobFolder
from ...trainers.job.metrics import spread
from ...trainers.taste.bring import opened
from ...trainers.taste.desk import Desk
from ...trainers.taste.store import Store, TasteError
from ..jobs.own_files import image
from ..jobs.view import name_of
from ..rewards.make import weight_folders
from .places import open_taste

PAIRS = 16
"""Most that are asked at once of a job's samples."""
ITERATIONS, MAX_PIXELS = 4, 1 << 24
"""Of the samples that are offered: the pictures of 16 prompts at 512 px."""

Sign = tuple[int, int]
_desks: dict[Path, tuple[Sign, Desk]] = {}
_opening = Lock()


def desk(name: str) -> Desk:
    """The desk of a taste; `NodeError` if there is none of that name."""
    store = open_taste(name)
    sign = store.made
    with _opening:
        known = _desks.get(store.root)
        if known is None or known[0] != sign:  # another was made in its place
            _desks[store.root] = known = sign, Desk(store, folders=weight_folders())
        return known[1]


def delete(name: str) -> None:
    """Remove a taste with its votes and pictures."""
    root = desk(name).store.root
    with _opening:
        _, closed = _desks.pop(root)
    closed.close()
    Store(root).delete()


def ask_about(desk: Desk, folder: JobFolder) -> int:
    """Put pairs of a job's samples up for votes, those of one prompt side by side.

    Returns:
        The number of pairs.

    Raises:
        TasteError: if there are none to ask about.
    """
    pictures, prompts, pixels = [], [], 0
    for file, prompt in _samples(folder):
        data = image(folder.root, file)
        if data is None or pixels > MAX_PIXELS:
            continue
        pictures.append(opened(io.BytesIO(data), file))
        prompts.append(prompt)
        pixels += pictures[-1].width * pictures[-1].height
    if len(pictures) < 2:
        raise TasteError(
            f"{name_of(folder)} has no samples yet; press Sample now, or wait for them"
        )
    count = desk.ask(pictures, prompts, f"samples of {name_of(folder)}", PAIRS)
    if not count:
        raise TasteError(f"all pairs of the samples of {name_of(folder)} were asked about already")
    return count


def _samples(folder: JobFolder) -> list[tuple[Path, str]]:
    """Files and prompts of some iterations' samples, those of one prompt together."""
    places = spread(folder.sampled_folders(), ITERATIONS)
    found = [
        (index, place / f"{index:03}.png", str(entry.get("prompt", "")))
        for place in places
        for index, entry in enumerate(folder.scores(int(place.name)))
    ]
    return [(file, prompt) for _, file, prompt in sorted(found, key=lambda each: each[0])]
