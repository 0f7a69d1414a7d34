"""From a node's widgets to a reward, whose networks are loaded when it first has to score."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any

from torch import nn

from ...pcpo.pretrained.catalogue import WEIGHTS
from ...pcpo.pretrained.fetch import is_offered
from ...pcpo.pretrained.find import MissingWeights
from ...pcpo.rewards import (
    REWARDS,
    Pictures,
    Reward,
    RewardUnavailable,
    Scores,
    load_reward,
    reward_class,
)
from ...trainers.errors import ConfigError
from ...trainers.reading import json_or_text, shown
from ..errors import NodeError
from ..jobs.access import downloads_off
from .servers import with_server

FOLDER = "reward_models"
"""Where weights of rewards are, under ComfyUI's models folder."""

TOWERS = "clip_vision"
"""ComfyUI's own folder of CLIP models, which some rewards look through."""

PATHS = ("weights", "folders", "clip", "vocab", "folder", "head")
"""Options of rewards that are paths: whoever sends a graph may not name files of this machine."""

AUTOMATIC = "automatic"
"""The choice of no file, and of no number format, in particular."""

DTYPES = (AUTOMATIC, "float32", "float16", "bfloat16")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx")


@dataclass(frozen=True)
class NamedReward:
    """A reward of `REWARDS` with what it was made from, so that a job can make it again.

    Attributes:
        name: its key in `REWARDS`.
        options: its keyword arguments as a JSON object with sorted keys.
    """

    name: str
    options: str
    made: Reward = field(compare=False)

    @property
    def needs_prompt(self) -> bool:
        """Whether the score depends on the prompt."""
        with explain_errors(self.name):
            return self.made.needs_prompt

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and largest possible value."""
        with explain_errors(self.name):
            return self.made.bounds

    @property
    def is_elsewhere(self) -> bool:
        """Whether a server computes it."""
        return self.made.is_elsewhere

    def score(self, images: Pictures, prompts: Sequence[str]) -> Scores:
        """Score each image against its own prompt."""
        with explain_errors(self.name):
            return self.made.score(images, prompts)

    def complaints(self, prompts: Sequence[str]) -> list[str | None]:
        """Why a prompt cannot be judged by, None where it can."""
        with explain_errors(self.name):
            return self.made.complaints(prompts)

    def modules(self) -> list[nn.Module]:
        """The networks, loaded if they are not yet."""
        with explain_errors(self.name):
            return self.made.modules()

    def fingerprint(self) -> dict[str, Any]:
        """What its numbers depend on."""
        with explain_errors(self.name):
            return self.made.fingerprint()


def reward_names() -> list[str]:
    """The rewards of PCPO Reward: all but tastes, which have names of their own, and a node."""
    return [name for name in REWARDS if name != "taste"]


def named_reward(name: str, weights: str, dtype: str, options: str) -> NamedReward:
    """The reward that the widgets describe.

    Args:
        name: a key of `REWARDS`.
        weights: one of `weight_files()`.
        dtype: one of `DTYPES`.
        options: keyword arguments as a JSON object; empty where there are none.
    """
    chosen, known = _json_object(options), options_of(name)
    for option in chosen:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise NodeError(f"the reward {name!r} has no option {option!r}; {there}")
        if option in PATHS:
            raise NodeError(
                f"the option {option!r} of the reward {name!r} is a path, which a graph may not "
                f"give; put the file into models/{FOLDER} or models/{TOWERS}, where it is "
                "recognised by its content, and leave the option out"
            )
    for widget, value in (("weights", weights), ("dtype", dtype)):
        if value == AUTOMATIC:
            continue
        if widget not in known:
            raise NodeError(
                f"the reward {name!r} reads no weights, and {widget} is {value!r}; set it to "
                f"{AUTOMATIC!r}"
            )
        chosen[widget] = weights_path(value) if widget == "weights" else value
    if "folders" in known:
        chosen["folders"] = weight_folders()
    return remake(name, json.dumps(chosen, sort_keys=True))


def remake(name: str, options: str) -> NamedReward:
    """Make a reward of what one was made from.

    Args:
        name: a key of `REWARDS`.
        options: keyword arguments as a JSON object; `NodeError` where they name a server that may
            not be asked.
    """
    known, given = options_of(name), json.loads(options)
    if "url" in known:
        key = reward_class(name).server
        given = with_server(name, key, known["url"].default, given)
    with explain_errors(name):
        made = load_reward(name, **given)
    return NamedReward(name, json.dumps(given, sort_keys=True), made)


def options_of(name: str) -> dict[str, Parameter]:
    """The keyword arguments of a reward's class."""
    with explain_errors(name):
        return dict(signature(reward_class(name)).parameters)


def _json_object(text: str) -> dict[str, Any]:
    try:
        options = json_or_text(text.strip() or "{}", "the text of the options")
    except ConfigError as error:
        raise NodeError(str(error)) from error
    if not isinstance(options, dict):
        raise NodeError(
            f"the options {shown(text)} are not a JSON object; leave them empty or write them like "
            '{"quality": 50}'
        )
    return options


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """Read one weight for all rewards, or one for each."""
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise NodeError(
                f"the weight {part.strip()!r} is not a number; write them like '1.0, 0.5'"
            )
    if len(found) not in (1, count):
        raise NodeError(
            f"the number of weights is {len(found)} and the number of rewards is {count}; "
            "give one for all or one for each, with commas between them"
        )
    return tuple(found) if len(found) == count else tuple(found * count)


# --- files ---------------------------------------------------------------------------------------


def weight_folders() -> list[str]:
    """The folders that rewards' weights are looked for in, models/reward_models first.

    Returns:
        The folders; none outside ComfyUI.
    """
    return [*_folders(), *_towers()]


def _folders() -> list[str]:
    try:
        import folder_paths
    except ImportError:
        return []
    own = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, own)
    return folder_paths.get_folder_paths(FOLDER)


def _towers() -> list[str]:
    try:
        import folder_paths
    except ImportError:
        return []
    return folder_paths.get_folder_paths(TOWERS)


def weight_files() -> list[str]:
    """What a node offers as weights: `AUTOMATIC`, then the files in the folders.

    Returns:
        Names in models/reward_models, and those in models/clip_vision with their folder before.
    """
    if not weight_folders():
        return [AUTOMATIC]
    import folder_paths

    own = [file for file in folder_paths.get_filename_list(FOLDER) if _is_weights(file)]
    towers = [file for file in folder_paths.get_filename_list(TOWERS) if _is_weights(file)]
    return [AUTOMATIC, *own, *(f"{TOWERS}/{file}" for file in towers)]


def _is_weights(file: str) -> bool:
    return file.lower().endswith(SUFFIXES)


def weights_path(file: str) -> str:
    """The full path of a weights file.

    Args:
        file: one of `weight_files()`.
    """
    weight_folders()
    import folder_paths

    path = folder_paths.get_full_path(FOLDER, file)
    if path is None and file.startswith(f"{TOWERS}/"):
        path = folder_paths.get_full_path(TOWERS, file.removeprefix(f"{TOWERS}/"))
    if path is None:
        raise NodeError(
            f"the weights {file!r} are not in models/{FOLDER}; put them there and press R"
        )
    return path


# --- what is wrong -------------------------------------------------------------------------------


@contextmanager
def explain_errors(name: str) -> Iterator[None]:
    """Turn a reward's own errors into one sentence; what is no fault of the user's passes."""
    try:
        yield
    except (NodeError, RewardUnavailable) as error:  # sentences already
        raise NodeError(f"{_download_hint(name, error)}{error}") from error
    except (ImportError, OSError, TypeError, ValueError) as error:
        raise NodeError(f"the reward {name!r} failed: {error}") from error


def _download_hint(name: str, error: Exception) -> str:
    """The panel's page, where it can download what is missing: first, for a notice is short."""
    key = error.key if isinstance(error, MissingWeights) else None
    if key is None or not is_offered(WEIGHTS[key]) or downloads_off() is not None:
        return ""
    return (
        f"the reward {name!r} lacks weights: press Download on the page Weights of the PCPO tab. "
        "By hand: "
    )
