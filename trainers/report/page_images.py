"""The images of a report: few and small enough, whatever a run has sampled.

Of the sampled iterations it shows the first, the last, the best and some evenly between; a large
image is reduced, which imports torch.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from ..job.folder import JobFolder
from ..job.metrics import spread

MAX_PROMPTS, MAX_COLUMNS = 16, 8
"""Most rows and columns of the grid of images."""
MAX_IMAGE_BYTES = 5 * 2**20
"""Most bytes of all images on the page; rows beyond it are left out, except the first."""
MAX_PIXELS = 2**26
"""Most pixels of all images that are reduced, likewise."""
SMALL_FILE = 2**16
"""Bytes of an image file that is included as it is."""
LARGE, SMALL, QUALITY = 512, 256, 88
"""Side in px of a copy in the compared columns and in the others, and the quality of its JPEG."""


def sampled_images(folder: JobFolder, best: int | None) -> dict[str, Any]:
    """Prompts, and for each chosen iteration the rewards and the images as base64.

    `best`, the iteration of the highest held-out reward, is chosen too.

    Returns:
        "prompts", "columns", and their numbers in the folder: "prompts_kept", "iterations_kept".
    """
    sampled = finished_samples(folder)
    chosen = [(place, folder.scores(int(place.name))) for place in _choose(sampled, best)]
    chosen = [(place, scores) for place, scores in chosen if scores]
    prompts = [str(score.get("prompt", "")) for score in chosen[-1][1]] if chosen else []
    places = [place for place, _ in chosen]
    rows = _rows_that_fit(places, min(len(prompts), MAX_PROMPTS), best)
    columns = [
        {
            "iteration": int(place.name),
            "rewards": [score.get("reward") for score in scores[: len(rows)]],
            "images": [row[i] for row in rows],
        }
        for i, (place, scores) in enumerate(chosen)
    ]
    totals = {"prompts_kept": len(prompts), "iterations_kept": len(sampled)}
    return {"prompts": prompts[: len(rows)], "columns": columns, **totals}


def finished_samples(folder: JobFolder) -> list[Path]:
    """The folders of sampled iterations, in order, the last one complete."""
    sampled = folder.sampled_folders()
    while sampled and not folder.scores(int(sampled[-1].name)):
        sampled.pop()  # scores.json is written last: this one is not finished
    return sampled


def _choose(sampled: Sequence[Path], best: int | None) -> list[Path]:
    """A few iterations, evenly, including the first and the last, and the best near its place."""
    chosen = spread(sampled, MAX_COLUMNS)
    others = [place for place in sampled if int(place.name) == best and place not in chosen]
    for place in others:
        near = min(chosen[1:-1], key=lambda other: abs(int(other.name) - int(place.name)))
        chosen[chosen.index(near)] = place
    return sorted(chosen, key=lambda place: int(place.name))


def _rows_that_fit(places: Sequence[Path], rows: int, best: int | None) -> list[list[str | None]]:
    found: list[list[str | None]] = []
    size = pixels = 0
    for row in range(rows):
        files = [place / f"{row:03}.png" for place in places]
        pixels += sum(_pixels(file) for file in files)
        if row and pixels > MAX_PIXELS:
            break
        ends = (files[0], files[-1])
        sides = [LARGE if f in ends or int(f.parent.name) == best else SMALL for f in files]
        images = [_image(file, side) for file, side in zip(files, sides, strict=True)]
        size += sum(map(len, filter(None, images)))
        if row and size > MAX_IMAGE_BYTES:
            break
        found.append([None if i is None else base64.b64encode(i).decode("ascii") for i in images])
    return found


def _is_large(file: Path) -> bool:
    try:
        return file.stat().st_size > SMALL_FILE
    except OSError:
        return False


def _pixels(file: Path) -> int:
    """The work of reducing an image, in pixels."""
    if not _is_large(file):
        return 0
    from ...pcpo.pictures.files import BadPicture, picture_size

    try:
        width, height = picture_size(file)
    except BadPicture:
        return 0
    return width * height


def _image(file: Path, side: int) -> bytes | None:
    """An image file's bytes, or those of a copy of at most `side`; None if there is none."""
    if not _is_large(file):
        try:
            return file.read_bytes()
        except OSError:
            return None
    from ...pcpo.pictures.files import BadPicture, open_picture

    try:
        picture = open_picture(file)
    except BadPicture:
        return None
    picture.thumbnail((side, side))
    copy = BytesIO()
    picture.save(copy, "JPEG", quality=QUALITY)
    return copy.getvalue()
