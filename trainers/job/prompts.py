"""The prompts of a run, and the choice for each iteration. Torch only where it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten

from ..config.sections import PromptConfig
from ..config.train_config import ConfigError
from ..reading import named, no_file, shown
from .prompt_files import looks_like_file, plain, read_prompt_file

PROMPT_SETS = Path(__file__).parents[1] / "config" / "prompt_sets"
HELD_OUT = {"scenes": "scenes_held_out"}
"""Built-in sets with another set for evaluation."""
WORDS = ("auto", "split", "training")
"""Values of prompts.held_out besides a set or a file."""
SHARE = 5
"""At most one of this number of prompts of a file is held out of training."""


def _scenes() -> tuple[str, ...]:
    from ...pcpo import scenes  # imports torch, and so is not at the top

    return scenes.split().reinforcement


def _scenes_held_out() -> tuple[str, ...]:
    from ...pcpo import scenes

    return scenes.split().held_out


def _built_in(name: str) -> Callable[[], tuple[str, ...]]:
    """A reader of a list in `prompt_sets/`, whose lines with a # give its origin."""

    def read() -> tuple[str, ...]:
        lines = (PROMPT_SETS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        return tuple(line for line in lines if line and not line.startswith("#"))

    return read


BUILT_IN: dict[str, Callable[[], tuple[str, ...]]] = {
    "scenes": _scenes,
    "scenes_held_out": _scenes_held_out,
    "animals": _built_in("animals"),
    "animals_activities": _built_in("animals_activities"),
    "varied": _built_in("varied"),
    "tags": _built_in("tags"),
}

# name -> (file, where it is, licence): sets of others, which are not shipped
EXTERNAL: dict[str, tuple[str, str, str]] = {
    "hpdv2": (
        "assets/prompts.txt (HPDv2's prompts)",
        "https://github.com/XueZeyue/DanceGRPO",
        "Apache-2.0",
    ),
    "pickapic": (
        "dataset/pickscore/train.txt (Pick-a-Pic's prompts, the safe-for-work part)",
        "https://github.com/yifan123/flow_grpo",
        "MIT; the data set's own: https://huggingface.co/datasets/yuvalkirstain/pickapic_v1",
    ),
    "ocr": (
        "dataset/ocr/train.txt",
        "https://github.com/yifan123/flow_grpo",
        "MIT",
    ),
}


@dataclass(frozen=True, slots=True)
class PromptSplit:
    """The prompts of a run.

    Attributes:
        held_out: of the comparison before and after.
        note: their origin, for the user.
    """

    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    note: str = ""

    def same_as(self, other: PromptSplit) -> bool:
        """Whether the prompts are the same, in the same order."""
        return (self.prompts, self.held_out) == (other.prompts, other.held_out)


def split_prompts(config: PromptConfig, count: int) -> PromptSplit:
    """Split prompts for training from at most `count` for evaluation; `ConfigError` as
    `read_prompts`.
    """
    prompts, source, asked = read_prompts(config.source), config.source, config.held_out
    if count == 0:
        return PromptSplit(prompts, ())
    if asked == "auto":
        asked = HELD_OUT.get(source, "training" if source in BUILT_IN else "split")
    if asked == "split":
        return _split(prompts, count)
    if asked == "training":
        note = (
            "the held-out prompts are trained on, too: they are the first of prompts.source; "
            "prompts.held_out takes others"
        )
        return PromptSplit(prompts, prompts[:count], note)
    held_out = _held_out(asked)[:count]
    both = [prompt for prompt in held_out if prompt in set(prompts)]
    note = f"held out: {len(held_out)} prompts of {asked}"
    if both:
        note += f", of which {len(both)} are trained on, too: {_first_few(both)}"
    return PromptSplit(prompts, held_out, note)


def _split(prompts: Sequence[str], count: int) -> PromptSplit:
    """Hold some prompts out, evenly from the whole list, each with all its copies."""
    distinct = list(dict.fromkeys(prompts))
    wanted = min(count, len(distinct) // SHARE)
    if wanted == 0:
        note = (
            f"{len(distinct)} prompts are too few to hold any out of training: the held-out reward "
            f"is of prompts that are trained on; write {SHARE} or more, or give others as "
            "prompts.held_out"
        )
        return PromptSplit(tuple(prompts), tuple(prompts[:count]), note)
    held_out = [distinct[(2 * i + 1) * len(distinct) // (2 * wanted)] for i in range(wanted)]
    kept = tuple(prompt for prompt in prompts if prompt not in set(held_out))
    note = f"held out of training: {wanted} of {len(distinct)} prompts, {_first_few(held_out)}"
    return PromptSplit(kept, tuple(held_out), note)


def _held_out(source: str) -> tuple[str, ...]:
    """`read_prompts` for the other field."""
    try:
        return read_prompts(source)
    except ConfigError as error:
        told = str(error).replace("--prompts.source", "--prompts.held-out")
        raise ConfigError(told.replace("prompts.source", "prompts.held_out")) from error


def _first_few(prompts: Sequence[str]) -> str:
    shown = ", ".join(repr(shorten(prompt, 60)) for prompt in prompts[:3])
    return f"{shown}, ..." if len(prompts) > 3 else shown


def read_prompts(source: str) -> tuple[str, ...]:
    """The prompts of a built-in set (a key of `BUILT_IN`) or of a file, in order.

    Raises:
        ConfigError: if there is no such set or file, or it cannot be read.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()
    if os.path.isfile(source):
        return read_prompt_file(Path(source), f"prompts.source {named(source)}")
    raise ConfigError(_missing_source(source))


def prompts_of(words: str, option: str = "--prompts") -> tuple[str, ...]:
    """A set or a file if there is one of that name, else the words themselves as one prompt.

    `option` gave the words; `ConfigError` if they name a file that cannot be read.
    """
    if words in {*BUILT_IN, *EXTERNAL} or os.path.isfile(words):
        return read_prompts(words)
    if looks_like_file(words):
        raise ConfigError(f"{option} is {shown(words)}, which {no_file(words)}; check the path")
    return (plain(words, option),)


def _missing_source(source: str) -> str:
    """Why there are no prompts of this name, and what to do."""
    if source in EXTERNAL:
        file, page, licence = EXTERNAL[source]
        return (
            f"prompts.source is {source!r}, a set that is not shipped: get {file} from {page} "
            f"(licence {licence}) and give its path with --prompts.source FILE"
        )
    why = no_file(source)
    why = "is neither a file" if why == "is no file" else f"{why}, neither a file"
    return (
        f"prompts.source is {shown(source)}, which {why} nor a built-in set; the sets are "
        f"{', '.join(BUILT_IN)}; known, but not shipped: {', '.join(EXTERNAL)}"
    )


def chosen_prompts(config: PromptConfig, count: int, seed: int, iteration: int) -> list[int]:
    """Indices of the prompts that an iteration uses: a function of its number alone.

    Args:
        config: how many, and in which order.
        iteration: counted from 0.
    """
    import torch

    from ...pcpo.rollout import generator_for

    wanted = config.per_iteration
    if config.order == "random":
        generator = generator_for(seed, "prompts", iteration)
        return torch.randint(count, (wanted,), generator=generator).tolist()
    first = iteration * wanted
    return [_shuffle(count, seed, i // count)[i % count] for i in range(first, first + wanted)]


@lru_cache(maxsize=2)  # an iteration may end one epoch and begin the next
def _shuffle(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """All prompts once, in an epoch's order."""
    import torch

    from ...pcpo.rollout import generator_for

    return tuple(torch.randperm(count, generator=generator_for(seed, "epoch", epoch)).tolist())
