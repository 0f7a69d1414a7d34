"""Where prompts come from, and which an iteration asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..pcpo import scenes
from ..pcpo.rollout import generator_for
from .config import ConfigError, PromptConfig

BUILT_IN: dict[str, Callable[[], tuple[str, ...]]] = {
    "scenes": lambda: scenes.split().reinforcement,
    "scenes_held_out": lambda: scenes.split().held_out,
}
HELD_OUT = {"scenes": "scenes_held_out"}


def read_prompts(source: str) -> tuple[str, ...]:
    """The prompts of a built-in set or of a file.

    Args:
        source: a key of `BUILT_IN`; a text file with one prompt a line; or a .jsonl file whose
            lines have a "prompt".

    Returns:
        The prompts, in order.

    Raises:
        ConfigError: where there is no such set or file, or it holds no prompt.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()
    file = Path(source)
    if not file.is_file():
        raise ConfigError(
            f"prompts.source is {source!r}, which is neither a file nor a built-in set; the sets "
            f"are {', '.join(BUILT_IN)}"
        )
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    lines = [line for line in lines if line]
    prompts = tuple(map(_prompt_of, lines)) if file.suffix == ".jsonl" else tuple(lines)
    if not prompts:
        raise ConfigError(f"prompts.source {file} holds no prompt; write one a line")
    return prompts


def _prompt_of(line: str) -> str:
    try:
        return json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(
            f'a line of the .jsonl file has no "prompt": {line[:60]!r}; each line must be '
            'like {"prompt": "a red circle"}'
        ) from error


def chosen_prompts(config: PromptConfig, count: int, seed: int, iteration: int) -> list[int]:
    """Which prompts an iteration asks for: a function of its number alone.

    Args:
        config: how many, and in which order.
        count: prompts there are.
        seed: of the order.
        iteration: counted from 0.

    Returns:
        Indices of prompts, `config.per_iteration` of them.
    """
    wanted = config.per_iteration
    if config.order == "random":
        generator = generator_for(seed, "prompts", iteration)
        return torch.randint(count, (wanted,), generator=generator).tolist()
    first = iteration * wanted
    return [_shuffled(count, seed, i // count)[i % count] for i in range(first, first + wanted)]


def _shuffled(count: int, seed: int, epoch: int) -> Sequence[int]:
    return torch.randperm(count, generator=generator_for(seed, "epoch", epoch)).tolist()
