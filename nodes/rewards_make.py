"""From a node's widgets to a reward, which is made when it is first asked to score."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from ..pcpo import rewards
from ..pcpo.rewards import REWARDS, Images, Reward, Scores, load_reward
from .errors import NodeError

FOLDER = "pcpo_rewards"
"""Where weights of rewards are, under ComfyUI's models folder."""

AUTOMATIC = "automatic"
"""The choice of no file in particular."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".onnx")
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


@dataclass(frozen=True)
class LazyReward:
    """A reward of `REWARDS` that is made when it is first asked to score, and then kept.

    Attributes:
        name: its key in `REWARDS`.
        options: its keyword arguments as a JSON object with sorted keys.
    """

    name: str
    options: str = "{}"

    @cached_property
    def made(self) -> Reward:
        """The reward itself."""
        with explained(self.name):
            return load_reward(self.name, **json.loads(self.options))

    @property
    def needs_prompt(self) -> bool:
        """Whether the score depends on the prompt."""
        return self.made.needs_prompt

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and largest possible value."""
        return self.made.bounds

    def score(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score each image against its own prompt."""
        reward = self.made
        with explained(self.name):
            return reward.score(images, prompts)


def lazy_reward(name: str, weights: str, options: str) -> LazyReward:
    """The reward that the widgets describe; what they say is checked, nothing is loaded.

    Args:
        name: a key of `REWARDS`.
        weights: a file of models/pcpo_rewards, or `AUTOMATIC`.
        options: keyword arguments as a JSON object; empty where there are none.

    Returns:
        The reward.

    Raises:
        NodeError: where an option or the weights file is not the reward's.
    """
    chosen, known = _json_object(options), option_names(name)
    for option in chosen:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise NodeError(f"the reward {name!r} has no option {option!r}; {there}")
    if weights != AUTOMATIC:
        if "weights" not in known:
            raise NodeError(
                f"the reward {name!r} reads no weights, and {weights!r} is chosen; "
                f"set the weights to {AUTOMATIC!r}"
            )
        chosen["weights"] = weights_path(weights)
    if "folders" in known and "folders" not in chosen:
        chosen["folders"] = weight_folders()
    return LazyReward(name, json.dumps(chosen, sort_keys=True))


def option_names(name: str) -> tuple[str, ...]:
    """The keyword arguments of a reward's class."""
    module, attribute = REWARDS[name]
    with explained(name):
        made_by = getattr(import_module(f".{module}", rewards.__name__), attribute)
    return tuple(inspect.signature(made_by).parameters)


def _json_object(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text.strip() or "{}")
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise NodeError(
            f"the options {text!r} are no JSON object; leave them empty or write them like "
            '{"quality": 50}'
        )
    return options


def parse_weights(text: str, count: int) -> tuple[float, ...]:
    """Read one weight for all rewards, or one for each.

    Args:
        text: numbers with commas between them.
        count: of rewards.

    Returns:
        One weight a reward.

    Raises:
        NodeError: where one is no finite number, or there are too few or too many.
    """
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise NodeError(f"the weight {part.strip()!r} is no number; write them like '1.0, 0.5'")
    if len(found) not in (1, count):
        raise NodeError(
            f"the number of weights is {len(found)} and that of rewards is {count}; "
            "give one for all or one for each, with commas between them"
        )
    return tuple(found) if len(found) == count else tuple(found * count)


# --- files ---------------------------------------------------------------------------------------


def weight_folders() -> list[str]:
    """The folders of rewards' weights, models/pcpo_rewards first; none outside ComfyUI."""
    try:
        import folder_paths
    except ImportError:
        return []
    own = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, own)
    return folder_paths.get_folder_paths(FOLDER)


def weight_files() -> list[str]:
    """What a node offers as weights: `AUTOMATIC`, then the files in the folders."""
    if not weight_folders():
        return [AUTOMATIC]
    import folder_paths

    there = folder_paths.get_filename_list(FOLDER)
    return [AUTOMATIC, *(file for file in there if file.lower().endswith(SUFFIXES))]


def weights_path(file: str) -> str:
    """The full path of a weights file.

    Raises:
        NodeError: where it is not there any more.
    """
    weight_folders()
    import folder_paths

    path = folder_paths.get_full_path(FOLDER, file)
    if path is None:
        raise NodeError(
            f"the weights {file!r} are not in models/{FOLDER}; put them there and press R"
        )
    return path


# --- what is missing -----------------------------------------------------------------------------


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn a reward's own errors into one sentence; what is no fault of the user's passes.

    Args:
        name: of the reward.

    Yields:
        Once.

    Raises:
        NodeError: where a package, a file or an option is at fault.
    """
    try:
        yield
    except ImportError as error:
        raise NodeError(_missing_package(name, error)) from error
    except FileNotFoundError as error:
        raise NodeError(_missing_file(name, error)) from error
    except (TypeError, ValueError) as error:
        raise NodeError(f"the reward {name!r} failed: {error}") from error


def _missing_package(name: str, error: ImportError) -> str:
    package = (error.name or "").split(".")[0]
    if not package or not isinstance(error, ModuleNotFoundError):
        return f"the reward {name!r} cannot be loaded: {error}"
    extra, packages = extra_of(package)
    what = f"install the extra {extra!r} ({packages})" if extra else "install it"
    return (
        f"the reward {name!r} needs the package {package!r}, which is not installed; "
        f"{what} into ComfyUI's Python with pip and start ComfyUI again"
    )


def extra_of(package: str) -> tuple[str, str]:
    """The optional extra of this pack that brings a package.

    Args:
        package: as it is imported.

    Returns:
        The extra's name and its packages with spaces between them, empty where none does.
    """
    try:
        text = PYPROJECT.read_text(encoding="utf-8")
    except OSError:
        return "", ""
    for extra, packages in tomllib.loads(text)["project"]["optional-dependencies"].items():
        names = [re.split(r"[^\w.-]", entry, maxsplit=1)[0] for entry in packages]
        if package.lower().replace("_", "-") in (n.lower().replace("_", "-") for n in names):
            return extra, " ".join(names)
    return "", ""


def _missing_file(name: str, error: FileNotFoundError) -> str:
    file = Path(error.filename).name if error.filename else str(error)
    source = getattr(error, "source", "")
    where = f"; download it from {source}" if source else ""
    return f"the reward {name!r} needs the file {file} in models/{FOLDER}{where}"
