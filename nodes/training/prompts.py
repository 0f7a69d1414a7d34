"""Where the prompts of a training come from, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...pcpo.rewards import Reward
from ...trainers.config.train_config import ConfigError
from ...trainers.job.prompt_files import SUFFIXES
from ...trainers.job.prompts import BUILT_IN, HELD_OUT, read_prompts
from ..errors import NodeError
from ..rewards.score import check_texts, lines_of

SETS = tuple(name for name in BUILT_IN if name not in HELD_OUT.values())
"""Built-in sets to train on."""

CLIP_TOKENS, MOST_TOKENS = 75, 512
"""What one chunk of CLIP takes of a prompt, and T5 or Qwen3 at most."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a training.

    Attributes:
        held_out: those of the comparison before and after, where they are others.
        built_in: name of the set they are, None where they are the user's own.
    """

    texts: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    built_in: str | None = None


def from_set(name: str) -> Prompts:
    """A built-in set."""
    other = HELD_OUT.get(name)
    return Prompts(read_prompts(name), read_prompts(other) if other else (), name)


def from_text(text: str) -> Prompts:
    """Prompts of a text box.

    Args:
        text: one prompt per line; empty lines are left out.
    """
    lines = tuple(lines_of(text))
    if not lines:
        raise NodeError("the text holds no prompt; write one prompt per line")
    return Prompts(lines)


def from_file(name: str) -> Prompts:
    """Prompts of a file in ComfyUI's input folder."""
    try:
        return Prompts(read_prompts(str(_input_file(name))))
    except ConfigError as error:
        raise NodeError(str(error)) from error


def input_files() -> list[str]:
    """Files of the input folder that may hold prompts."""
    import folder_paths

    folder = Path(folder_paths.get_input_directory())
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(file.name for file in found if file.suffix.lower() in SUFFIXES)


def _input_file(name: str) -> Path:
    import folder_paths

    if name not in input_files():
        raise NodeError(
            f"there is no prompt file {name!r}; put a file of prompts "
            f"({', '.join(SUFFIXES)}) into ComfyUI's input folder and press R"
        )
    return Path(folder_paths.get_input_directory()) / name


def file_sign(name: str) -> tuple[str, int, int]:
    """Changes when the file does."""
    try:
        about = _input_file(name).stat()
    except (NodeError, OSError):
        return name, 0, 0
    return name, about.st_mtime_ns, about.st_size


def write_prompts(prompts: Prompts, file: Path) -> str:
    """The value of `prompts.source`: a built-in set's name, or a file written here.

    Args:
        file: where own prompts are written, a .jsonl file.
    """
    if prompts.built_in is not None:
        return prompts.built_in
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in prompts.texts]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines), encoding="utf-8")
    return str(file)


# --- what is refused -----------------------------------------------------------------------------


def check_prompts(prompts: Prompts, clip: Any, rewards: Sequence[Reward]) -> None:
    """Refuse a prompt that the text encoder or a reward cannot read."""
    texts = dict.fromkeys((*prompts.texts, *prompts.held_out))
    for text in texts:
        if "embedding:" in text:
            raise NodeError(
                f"the prompt {text[:60]!r} names an embedding, which training cannot use; "
                "remove 'embedding:' from it"
            )
        if limit := _limit_passed(clip, text):
            raise NodeError(
                f"the prompt {text[:60]!r}... is too long for the text encoder; shorten it to "
                f"{limit} tokens, or its end would be trained on unseen"
            )
    for reward in rewards:
        check_texts(reward, list(texts))


def tokens_of(clip: Any, text: str) -> dict[str, list[Any]]:
    """Chunks of tokens by text encoder, brackets being letters as in training."""
    found = clip.tokenize(text)
    is_literal = "qwen3_4b" in found  # brackets are letters there anyway
    return found if is_literal else clip.tokenize(text.replace("(", "\\(").replace(")", "\\)"))


def t5_length(clip: Any, prompts: Prompts) -> int:
    """How many tokens ComfyUI gives T5 for the longest of some prompts, with its padding.

    Args:
        clip: the CLIP, of which T5 is a part.

    Returns:
        The length, at most `MOST_TOKENS`.
    """
    texts = (*prompts.texts, *prompts.held_out)
    return min(MOST_TOKENS, max(len(tokens_of(clip, text)["t5xxl"][0]) for text in texts))


def _limit_passed(clip: Any, text: str) -> int | None:
    """The text encoder's limit in tokens, if a prompt exceeds it."""
    words = getattr(getattr(clip, "tokenizer", None), "clip_l", None)
    limit = getattr(words, "max_length", CLIP_TOKENS + 2) - 2  # without begin and end
    if len(text.encode()) <= limit:  # no token is shorter than a byte
        return None
    found = tokens_of(clip, text)
    # FLUX takes of CLIP no more than a summary
    alone = {("l", "t5xxl"): "t5xxl", ("qwen3_4b",): "qwen3_4b"}.get(tuple(sorted(found)))
    if alone is not None:
        return MOST_TOKENS if len(found[alone][0]) > MOST_TOKENS else None
    return limit if max(map(len, found.values())) > 1 else None
