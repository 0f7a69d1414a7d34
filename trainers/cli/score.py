"""`pcpo score`: rewards of image files, as a table, a CSV file and a contact sheet."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field

from ...pcpo.pictures.contact_sheet import contact_sheet
from ...pcpo.pictures.files import BadPicture, open_picture, picture_size
from ...pcpo.rewards import Scores, WeightedSum
from ...pcpo.rewards.base import on_device
from ...pcpo.statistics.tables import align_columns
from ..config.arguments import Arguments, Repeated, Words, parse
from ..config.reward_options import rewards_of
from ..config.train_config import ConfigError, validate
from ..job.files import cell, replace_file, write_csv
from ..job.folder import JobFolder
from ..job.preflight import check_rewards
from ..job.prompt_files import plain
from ..job.prompts import prompts_of
from ..memory.devices import device_of
from ..reading import check_target, named, shown
from ..report.progress import Progress
from ..run.rewards import RewardSet

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
AT_ONCE = 16
"""Pictures in memory."""

PIXELS = 1 << 26
"""Pixels of all pictures in memory, if there are several."""

CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that steer a terminal: escapes, line ends, the direction of writing."""

THUMBNAIL = 384
"""Longer side in px of a picture that waits for the sheet."""


class ScoreArguments(Arguments):
    """Score image files with one reward or several."""

    images: Words = Field(description="image files, or one folder of images")
    reward: Repeated = Field(
        default=[],
        description="NAME or NAME:WEIGHT of a reward; may be repeated; by default 'scene'",
    )
    options: list[str] = Field(
        default=[],
        description="NAME.OPTION=VALUE ...: options of the rewards, as shown by the command rewards"
        " list, and weight, normalise, scale, shift",
    )
    prompts: str | None = Field(
        default=None,
        description="one prompt for all images, or a set or file with one per image; by default a "
        "folder's prompts.json",
    )
    csv: str | None = Field(default=None, description="also write the table to this CSV file")
    sheet: str | None = Field(
        default=None, description="also draw a contact sheet in this PNG file"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where to compute")


def main(arguments: list[str]) -> int:
    """Print one line per image, best first, and the means; 1 if an image has no score."""
    a = parse(ScoreArguments, arguments, "pcpo score")
    rewards = rewards_of(a.reward or ["scene"], a.options)
    config = validate({"rewards": rewards}, "pcpo score")
    check_rewards(config, "pcpo score")
    device = device_of(a.device)
    files = _files(a.images)
    reward_set = RewardSet.from_config(config)
    reward = reward_set.as_one()
    prompts = _prompts_of(files, a.prompts, reward.needs_prompt)
    _check_outputs(a.csv, a.sheet)
    with on_device(reward.modules(), device):
        scores, shown = _score_files(reward, files, prompts, keep=a.sheet is not None)
    order = scores.values.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True).tolist()
    rows = _rows(files, prompts, scores, order)
    print(_align(rows))
    if a.csv is not None:
        write_csv(Path(a.csv), (map(cell, row) for row in rows[:-1]))  # without the means
        print(f"table  {a.csv}")
    if a.sheet is not None:
        with replace_file(Path(a.sheet)) as fresh:
            contact_sheet(shown, scores.values.tolist(), order).save(fresh, "PNG")
        print(f"sheet  {a.sheet}")
    return 0 if scores.values.isfinite().all() else 1


def _score_files(
    reward: WeightedSum, files: Sequence[Path], prompts: Sequence[str], *, keep: bool
) -> tuple[Scores, list[Image.Image]]:
    """The scores of all files, and small copies if they are kept.

    A few pictures are in memory at a time; running scales see all before they scale one.
    """
    bar = Progress(sys.stderr).bar("scoring", len(files))
    parts: list[list[Scores]] = [[] for _ in reward.rewards]
    shown: list[Image.Image] = []
    for some in _batches(files):
        pictures, faults = _read(files[some])
        by_reward = reward.parts(pictures, prompts[some])
        for part, scores in zip(parts, by_reward, strict=True):
            errors = scores.errors or (None,) * len(pictures)
            whys = tuple(fault or why for fault, why in zip(faults, errors, strict=True))
            part.append(Scores(scores.values, scores.details, whys))
        for picture in pictures if keep else ():
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            shown.append(picture if min(picture.size) else Image.new("RGB", (64, 64), "#7a1f1f"))
        bar(some.stop)
    return reward.total([Scores.concatenate(part) for part in parts]), shown


def _batches(files: Sequence[Path]) -> Iterator[slice]:
    """Group files to hold in memory together; large pictures are held in smaller groups."""
    start = total = 0
    for i, file in enumerate(files):
        width, height = (0, 0)
        with suppress(BadPicture):
            width, height = picture_size(file)
        if i > start and (i - start == AT_ONCE or total + width * height > PIXELS):
            yield slice(start, i)
            start, total = i, 0
        total += width * height
    yield slice(start, len(files))


def _read(files: Sequence[Path]) -> tuple[list[Image.Image], list[str | None]]:
    """The pictures, one without pixels if it cannot be read, and why."""
    pictures: list[Image.Image] = []
    faults: list[str | None] = []
    for file in files:
        try:
            pictures.append(open_picture(file))
            faults.append(None)
        except BadPicture as error:
            pictures.append(Image.new("RGB", (0, 0)))
            faults.append(f"cannot be read as an image: {error}")
    return pictures, faults


def _files(images: list[str]) -> list[Path]:
    given = [Path(image) for image in images]
    if len(given) == 1 and os.path.isdir(given[0]):
        given = sorted(file for file in given[0].iterdir() if file.suffix.lower() in SUFFIXES)
    missing = next((file for file in given if not os.path.isfile(file)), None)
    if missing is not None or not given:
        what = named(missing or images[0])
        raise ConfigError(f"there is no image {what}; give files, or one folder of images")
    return given


def _prompts_of(files: list[Path], source: str | None, needed: bool) -> list[str]:
    beside = files[0].parent / "prompts.json"
    if source is None and os.path.isfile(beside):
        listed = JobFolder(beside.parent).read(beside.name)
        return [plain(str(listed.get(file.name, "")), str(beside)) for file in files]
    if source is None and needed:
        raise ConfigError("this reward needs prompts; give --prompts with one for all or a file")
    words = source or ""
    prompts = list(prompts_of(words)) if words else [words]
    if len(prompts) == 1:
        return prompts * len(files)
    if len(prompts) != len(files):
        raise ConfigError(f"{len(prompts)} prompts for {len(files)} images; give one an image")
    return prompts


def _check_outputs(table: str | None, sheet: str | None) -> None:
    """Refuse files that cannot be written, before anything is scored."""
    for option, given, suffix in (("--csv", table, ".csv"), ("--sheet", sheet, ".png")):
        if given is None:
            continue
        if Path(given).suffix.lower() != suffix or os.path.isdir(given):
            raise ConfigError(f"{option} is {shown(given)}; give a file that ends in {suffix}")
        check_target(given, option, is_folder=False)


# --- the table -----------------------------------------------------------------------------------


def _rows(
    files: Sequence[Path], prompts: Sequence[str], scores: Scores, order: Sequence[int]
) -> list[list[str]]:
    """A head, a line per image and the means: score, its parts, file, error, prompt."""
    parts = next((list(detail) for detail in scores.details if detail), [])
    parts = parts if len(parts) > 1 else []
    rows = [["score", *parts, "file", "error", "prompt"]]
    for i in order:
        numbers = [scores.values[i].item(), *(scores.details[i].get(p, math.nan) for p in parts)]
        error = scores.errors[i] if scores.errors else None
        rows.append([*map(_number, numbers), str(files[i]), error or "", prompts[i]])
    good = [i for i in order if math.isfinite(scores.values[i].item())]
    sums = [
        sum(scores.values[good].tolist()),
        *(sum(scores.details[i][p] for i in good) for p in parts),
    ]
    means = [_number(total / len(good)) if good else "" for total in sums]
    return [*rows, [*means, f"mean of {len(good)} images", "", ""]]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _align(rows: list[list[str]]) -> str:
    """Aligned columns, numbers to the right; the last two joined, an error replacing the prompt."""
    short = [[visible(c) for c in (*row[:-2], row[-2] or row[-1])] for row in rows]
    short[0][-1] = "prompt"
    return align_columns(short, len(rows[0]) - 3)


def visible(text: str) -> str:
    """Escape a text's control characters, which could steer a terminal."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
