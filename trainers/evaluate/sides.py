"""What `pcpo evaluate` compares: models and folders of images, each under a name. No torch.

The first side is the base that the others are compared with. A side is sampled by this command
(the model as it is, with a LoRA, or with other weights) or exists already (a folder of images).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config.train_config import ConfigError, TrainConfig, flat, validate_stored
from ..job.files import checksum
from ..job.folder import JobFolder
from ..job.metrics import lines_of
from ..reading import shown
from .comparison import METHODS, SETUP, read_setup

BASE = "base"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things that are compared.

    Attributes:
        name: of its folder and of its column in tables; unique.
        kind: "base" (the model itself), "weights" (a file put on it) or "images" (a folder).
        path: of the file or folder; None for the base.
        method: groups runs of one method at several seeds in the mixed model.
        seed: of its run; None without one.
        batch: images per iteration of its run; None without one.
        reward: held-out reward of its run at that iteration.
    """

    name: str
    kind: str
    path: Path | None = None
    method: str = ""
    seed: int | None = None
    batch: int | None = None
    run: Path | None = None
    iteration: int | None = None
    reward: float | None = None

    def identity(self) -> dict[str, Any]:
        """What its images depend on, besides the settings of all."""
        if self.kind != "weights" or self.path is None:
            return {"kind": self.kind}
        return {"kind": self.kind, "crc32": checksum(self.path)}

    def as_json(self) -> dict[str, Any]:
        """All fields, for JSON."""
        paths = {
            k: None if v is None else str(v) for k, v in (("path", self.path), ("run", self.run))
        }
        return asdict(self) | paths


@dataclass(frozen=True, slots=True)
class Given:
    """The things of a command line.

    Attributes:
        sides: without the base.
        config: of the first run among them; None without one.
        configs: of all runs and comparisons.
    """

    sides: tuple[Side, ...]
    config: TrainConfig | None
    configs: tuple[TrainConfig, ...] = ()


def read_things(words: Sequence[str]) -> Given:
    """Read the sides that a command line names.

    Args:
        words: each PATH or NAME=PATH of a run, a file of weights, a folder of images, or the folder
            of a comparison; a run may end in @ITERATION.

    Raises:
        ConfigError: naming the thing that is none of these, or two of one name.
    """
    sides: list[Side] = []
    configs: list[TrainConfig] = []
    for word in words:
        named_sides, own = _side_of_word(word)
        sides += named_sides
        configs += [] if own is None else [own]
    names = [BASE, *(side.name for side in sides)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two things are called {twice!r}; give them names: NAME=PATH")
    return Given(tuple(sides), next(iter(configs), None), tuple(configs))


def _side_of_word(word: str) -> tuple[list[Side], TrainConfig | None]:
    name, equals, text = word.partition("=")
    if not equals or os.path.exists(word):
        name, text = "", word
    where, at, iteration = text.rpartition("@")
    if not at or os.path.exists(text) or not iteration.isdecimal():
        where, iteration = text, ""
    path = Path(where)
    if os.path.isfile(path / SETUP):
        return _comparison(path)
    if os.path.isfile(path / "job.json"):
        side, config = run_side(path, name, int(iteration) if iteration else None)
        return [side], config
    if os.path.isdir(path):
        return [Side(_plain(name or path.resolve().name), "images", path, name or path.name)], None
    if os.path.isfile(path) and path.suffix == ".safetensors":
        return [Side(_plain(name or path.stem), "weights", path, name or path.stem)], None
    raise ConfigError(
        f"{shown(word)} is nothing to evaluate; give a run, a LoRA (.safetensors), a folder of "
        "images or the folder of a comparison"
    )


def run_side(path: Path, name: str = "", iteration: int | None = None) -> tuple[Side, TrainConfig]:
    """A run at an iteration, and its config; `ConfigError` if it has no such export.

    Args:
        name: of the side; the folder's if empty.
        iteration: the last one exported if None.
    """
    folder = JobFolder(path)
    config = validate_stored(folder.job()["config"], str(path / "job.json"))
    exports = folder.exports()
    chosen = iteration if iteration is not None else max(exports, default=None)
    if chosen is None or chosen not in exports:
        known = ", ".join(map(str, exports)) or "none"
        raise ConfigError(f"{path} has no export of iteration {chosen}; it has {known}")
    own = name or path.resolve().name
    side = Side(
        _plain(own),
        "weights",
        exports[chosen],
        _method(config) or own,
        config.run.seed,
        config.images,
        path,
        chosen,
        rewards_of_run(folder).get(chosen),
    )
    return side, config


def _method(config: TrainConfig) -> str:
    """The most specific of the comparison's names for a run's method; empty if it has none."""
    now = flat(config.model_dump())
    of = [name for name, own in METHODS.items() if all(now[k] == v for k, v in own.items())]
    return max(of, key=lambda name: len(METHODS[name]), default="")


def rewards_of_run(folder: JobFolder) -> dict[int, float]:
    """Held-out reward of each evaluated iteration."""
    return {m["iteration"]: m["held_out"] for m in lines_of(folder.metrics_file, "held_out")}


def _comparison(path: Path) -> tuple[list[Side], TrainConfig]:
    """Every finished run of a comparison."""
    comparison = read_setup(path)
    sides = []
    for member in comparison.members():
        if member.is_finished():
            side, _ = run_side(member.folder.root, f"{member.label}-seed{member.seed}")
            sides.append(replace(side, method=member.label))
    if not sides:
        raise ConfigError(f"no run in {path} is finished; there is nothing to evaluate")
    return sides, comparison.config


def _plain(name: str) -> str:
    """A name that a folder may have."""
    return re.sub(r"[^\w.+=,-]", "_", name) or "_"


# --- folders of images ---------------------------------------------------------------------------


def images_of(folder: Path) -> dict[str, list[Path]]:
    """The images of a folder by prompt, in the order of their names.

    Args:
        folder: with a prompts.json (name of a file: its prompt); without it all images belong to
            one unknown prompt.

    Raises:
        ConfigError: if there is no image, one has no prompt, or they have several sizes.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"{folder} holds no image; give a folder of {', '.join(SUFFIXES)} files")
    has_prompts = (folder / "prompts.json").is_file()
    listed = JobFolder(folder).read("prompts.json")
    by_prompt: dict[str, list[Path]] = {}
    for file in files:
        if has_prompts and file.name not in listed:
            raise ConfigError(
                f"{folder / 'prompts.json'} does not name {file.name}; add it, or remove the image"
            )
        by_prompt.setdefault(str(listed.get(file.name, "")), []).append(file)
    _check_sizes(folder, files)
    return by_prompt


def _check_sizes(folder: Path, files: Sequence[Path]) -> None:
    """Refuse images of several sizes; unreadable ones are left to the measurement."""
    from ...pcpo.pictures.files import BadPicture, picture_size

    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            sizes.setdefault(picture_size(file), file)
        except BadPicture:
            continue
    if len(sizes) > 1:
        (one, first), (other, second) = list(sizes.items())[:2]
        raise ConfigError(
            f"{folder} holds images of several sizes: {first.name} has {one[0]}x{one[1]} pixels, "
            f"{second.name} {other[0]}x{other[1]}; give images of one size"
        )


def check_prompts(name: str, there: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a side whose prompts are not the base's, naming one that is missing or surplus."""
    missing = [prompt for prompt in wanted if prompt not in there]
    strange = [prompt for prompt in there if prompt not in wanted]
    if missing or strange:
        what = f"has no image of {missing[0]!r}" if missing else f"has images of {strange[0]!r}"
        raise ConfigError(
            f"{name} {what}, and the base {'has' if missing else 'has not'}: the prompts must be "
            "the same; evaluate images of equal prompts"
        )
