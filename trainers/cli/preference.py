"""`pcpo preference`: a blind page of pairs, and the win rate of the choices made on it.

    make    page.html, to give to people, and key.json, to keep
    count   the win rate from the choices that the page exported

The page does not show which side an image is of: the images are written anew without metadata, and
which of a pair is left is drawn at random and recorded in key.json alone.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..config.arguments import POSITIONAL, Arguments, Words, parse
from ..config.bounds import Images, Seed
from ..config.train_config import ConfigError
from ..evaluate.command import PLAN
from ..evaluate.sides import images_of
from ..job.files import write_json, write_text
from ..job.folder import JobFolder
from ..job.preflight import hold_folder
from ..reading import check_target, named
from ..report.page import page_of

TEMPLATE = Path(__file__).with_name("preference_page.html")
KEY = "key.json"
CHOICES = ("left", "right", "tie")


class PreferenceArguments(Arguments):
    """Make a page of pairs of equal prompt and seed, or count the choices that people made on it:
    the win rate of the second side, with its interval.
    """

    what: Annotated[Literal["make", "count"], POSITIONAL] = Field(description="make or count")
    things: Words = Field(
        description="make: the folder of an evaluation, or two folders of images; count: the "
        "folder of the page, with its key.json, and the files that the page exported"
    )
    sides: list[str] = Field(
        default=[], description="names of two sides of the evaluation; by default its only two"
    )
    pairs: Images = Field(
        default=60, description="number of pairs; at most one per prompt and seed"
    )
    seed: Seed = Field(default=0, description="seed for the choice of pairs, and of left and right")
    question: str = Field(
        default="Which image do you prefer for this prompt?", description="question for every pair"
    )
    out: str = Field(default="preference", description="folder of the page and its key")


def main(arguments: list[str]) -> int:
    """Make a page, or count."""
    a = parse(PreferenceArguments, arguments, "pcpo preference")
    return _make(a) if a.what == "make" else _count(a.things)


# --- make ----------------------------------------------------------------------------------------


def _make(a: PreferenceArguments) -> int:
    """Write the page and its key."""
    out = Path(a.out)
    check_target(a.out, "--out", is_folder=True)
    with hold_folder(out, "preference"):
        if os.path.exists(out / KEY):
            raise ConfigError(f"{out} holds a page already; choose another folder (--out)")
        return _write(a, out)


def _write(a: PreferenceArguments, out: Path) -> int:
    """Draw pairs, and write the page and its key."""
    folders = _folders(a)
    one, other = (images_of(folder) for folder in folders.values())
    draw = random.Random(a.seed)
    common = [
        (prompt, i)
        for prompt in one
        for i in range(min(len(one[prompt]), len(other.get(prompt, []))))
    ]
    if not common:
        raise ConfigError(f"{' and '.join(folders)} have no prompt in common; there are no pairs")
    chosen = draw.sample(common, min(a.pairs, len(common)))
    names = list(folders)
    key: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    for prompt, i in chosen:
        order = names if draw.random() < 0.5 else names[::-1]
        files = {names[0]: one[prompt][i], names[1]: other[prompt][i]}
        key.append({"prompt": prompt, "image": i, "left": order[0], "right": order[1]})
        shown.append({"prompt": prompt, "images": [_plain(files[name]) for name in order]})
    page = secrets.token_hex(8)
    data = {"page": page, "question": a.question, "pairs": shown}
    write_text(out / "page.html", page_of(TEMPLATE, a.question, data))
    write_json(out / KEY, {"page": page, "sides": names, "seed": a.seed, "pairs": key})
    print(f"{len(key)} pairs in {out / 'page.html'}; keep {out / KEY} to yourself")
    return 0


def _folders(a: PreferenceArguments) -> dict[str, Path]:
    """The two sides' folders by name."""
    paths = [Path(thing) for thing in a.things]
    if len(paths) == 2 and all(map(os.path.isdir, paths)):
        names = [path.resolve().name for path in paths]
        names = names if names[0] != names[1] else [str(path) for path in paths]
        if names[0] == names[1]:
            raise ConfigError(f"{names[0]} is given twice; give two different folders of images")
        return dict(zip(names, paths, strict=True))
    if len(paths) != 1 or not os.path.isfile(paths[0] / PLAN):
        raise ConfigError("give the folder of an evaluation, or two folders of images")
    told = JobFolder(paths[0]).read("result.json").get("sides", [])
    there = {
        side["name"]: Path(side["path"])
        if side.get("kind") == "images"
        else paths[0] / "images" / side["name"]
        for side in told
    }
    names = a.sides or list(there)
    strange = [name for name in names if name not in there]
    if strange or len(names) != 2:
        what = f"there is no side {strange[0]!r}" if strange else f"{len(names)} sides"
        raise ConfigError(f"{what}; name two with --sides, of {', '.join(there) or 'none'}")
    return {name: there[name] for name in names}


def _plain(file: Path) -> str:
    """An image as PNG without metadata, for a page."""
    from PIL import Image

    from ...pcpo.pictures.files import BadPicture, open_picture

    try:
        pixels = open_picture(file)
    except BadPicture as error:
        raise ConfigError(f"{file} cannot be read as an image ({error}); remove it") from error
    bare = Image.frombytes("RGB", pixels.size, pixels.tobytes())
    written = io.BytesIO()
    bare.save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


# --- count ---------------------------------------------------------------------------------------


def _count(things: list[str]) -> int:
    if not things:
        raise ConfigError("name the folder of the page, and the files that people saved")
    folder, *files = map(Path, things)
    key = JobFolder(folder).read(KEY)
    if not key:
        raise ConfigError(f"{named(folder)} holds no page: there is no {KEY} in it")
    result = count_choices(key, [_choices(file, key) for file in files])
    write_json(folder / "win_rate.json", result)
    print(_summary(result))
    return 0


def _choices(file: Path, key: Mapping[str, Any]) -> dict[str, str]:
    """One person's choices, by number of the pair; `ConfigError` if the file is of another page."""
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        page, choices = saved["page"], dict(saved["choices"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} holds no choices ({error}); give what the page saved") from error
    if page != key["page"]:
        raise ConfigError(f"{file} is of another page ({page}); count it with that page's key")
    wrong = next(
        (n for n, choice in choices.items() if not _is_choice(n, choice, len(key["pairs"]))), None
    )
    if wrong is not None:
        raise ConfigError(f"{file}: {choices[wrong]!r} of pair {wrong!r} is no choice of this page")
    return choices


def _is_choice(number: Any, choice: Any, pairs: int) -> bool:
    return str(number).isdecimal() and int(number) < pairs and choice in CHOICES


def count_choices(key: Mapping[str, Any], people: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The win rate of the second side against the first.

    Args:
        people: the choices of each person, by number of the pair.

    Returns:
        "side", "against", "wins", "losses", "ties", "rate" with "low" and "high" (Wilson's 95%),
        "left" (the share of choices that fell on the left image), "people" and "pairs".

    Raises:
        ConfigError: if nobody chose anything.
    """
    from ...pcpo.statistics import win_rate

    first, second = key["sides"]
    seen: Counter[str] = Counter()
    left = 0
    for choices in people:
        for number, choice in choices.items():
            pair = key["pairs"][int(number)]
            seen["tie" if choice == "tie" else pair[choice]] += 1
            left += choice == "left"
    if not seen:
        raise ConfigError("there is no choice in these files; export the page after choosing")
    rate = win_rate(seen[second], seen[first], seen["tie"])
    decided = seen[first] + seen[second]
    return {
        "side": second,
        "against": first,
        "wins": seen[second],
        "losses": seen[first],
        "ties": seen["tie"],
        "rate": rate.value,
        "low": rate.low,
        "high": rate.high,
        "left": left / decided if decided else None,
        "people": len(people),
        "pairs": len(key["pairs"]),
    }


def _summary(result: Mapping[str, Any]) -> str:
    left = "" if result["left"] is None else f"; left was chosen {result['left']:.0%} of the time"
    return (
        f"{result['side']} against {result['against']}: {result['wins']} won, {result['losses']} "
        f"lost, {result['ties']} equal\n"
        f"win rate {result['rate']:.1%} [{result['low']:.1%}, {result['high']:.1%}] (Wilson's 95%; "
        f"equal ones count half), {result['people']} people{left}"
    )
