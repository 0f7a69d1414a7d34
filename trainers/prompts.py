"""Where prompts come from, and which an iteration asks for. Torch only where it is needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .config import ConfigError, PromptConfig

PROMPT_SETS = Path(__file__).parent / "prompt_sets"
HELD_OUT = {"scenes": "scenes_held_out"}


def _scenes() -> tuple[str, ...]:
    from ..pcpo import scenes  # imports torch, and so is not at the top

    return scenes.split().reinforcement


def _scenes_held_out() -> tuple[str, ...]:
    from ..pcpo import scenes

    return scenes.split().held_out


def _shipped(name: str) -> Callable[[], tuple[str, ...]]:
    """A reader of a list in `prompt_sets/`, whose lines with a # say where it comes from."""

    def read() -> tuple[str, ...]:
        lines = (PROMPT_SETS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
        return tuple(line for line in lines if line and not line.startswith("#"))

    return read


BUILT_IN: dict[str, Callable[[], tuple[str, ...]]] = {
    "scenes": _scenes,
    "scenes_held_out": _scenes_held_out,
    "animals": _shipped("animals"),
    "animals_activities": _shipped("animals_activities"),
    "varied": _shipped("varied"),
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


def read_prompts(source: str) -> tuple[str, ...]:
    """The prompts of a built-in set or of a file.

    Args:
        source: a key of `BUILT_IN`; a text file with one prompt a line; or a .jsonl file whose
            lines have a "prompt".

    Returns:
        The prompts, in order.

    Raises:
        ConfigError: where there is no such set or file, or it is no text or holds no prompt.
    """
    if source in BUILT_IN:
        return BUILT_IN[source]()
    file = Path(source)
    if not file.is_file():
        raise ConfigError(_absent(source))
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"prompts.source {file} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise ConfigError(f"prompts.source {file} holds no prompt; write one a line")
    if file.suffix.lower() == ".jsonl":
        return tuple(_prompt_of(line, f"{file.name}, line {number}") for number, line in numbered)
    return tuple(line for _, line in numbered)


def _absent(source: str) -> str:
    """Why there are no prompts of this name, and what to do."""
    if source in EXTERNAL:
        file, page, licence = EXTERNAL[source]
        return (
            f"prompts.source is {source!r}, a set that is not shipped: get {file} from {page} "
            f"(licence {licence}) and give its path with --prompts.source FILE"
        )
    return (
        f"prompts.source is {source!r}, which is neither a file nor a built-in set; the sets are "
        f"{', '.join(BUILT_IN)}; known, but not shipped: {', '.join(EXTERNAL)}"
    )


def _prompt_of(line: str, where: str) -> str:
    """The prompt of a .jsonl line; `where` names file and line.

    Raises:
        ConfigError: where the line is no JSON object with a "prompt".
    """
    try:
        prompt = json.loads(line)["prompt"]
    except (json.JSONDecodeError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(
            f'{where} has no "prompt": {line[:60]!r}; each line must be like '
            '{"prompt": "a red circle"}'
        )
    return prompt.strip()


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
    import torch

    from ..pcpo.rollout import generator_for

    wanted = config.per_iteration
    if config.order == "random":
        generator = generator_for(seed, "prompts", iteration)
        return torch.randint(count, (wanted,), generator=generator).tolist()
    first = iteration * wanted
    return [_shuffled(count, seed, i // count)[i % count] for i in range(first, first + wanted)]


def _shuffled(count: int, seed: int, epoch: int) -> Sequence[int]:
    import torch

    from ..pcpo.rollout import generator_for

    return torch.randperm(count, generator=generator_for(seed, "epoch", epoch)).tolist()
