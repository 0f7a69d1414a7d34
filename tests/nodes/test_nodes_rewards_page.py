"""The help page of PCPO Reward: its tables say what the classes and the catalogue say."""

from __future__ import annotations

import inspect
import json
import math
import re
from pathlib import Path

import comfy_api_fixture  # noqa: F401  before any node
import comfyui_pcpo
import pytest
from comfyui_pcpo.nodes.rewards.make import options_of, reward_names
from comfyui_pcpo.pcpo.pretrained.catalogue import WeightFile, of_reward
from comfyui_pcpo.pcpo.rewards import REWARDS, reward_class

PAGE = Path(comfyui_pcpo.__path__[0]) / "nodes" / "web" / "docs" / "PCPOReward.md"
WIDGETS = ("weights", "folders", "dtype")
"""Options that have a widget, or that the node sets."""


def judged_by(name: str) -> str:
    """The first sentence of the reward's class."""
    return inspect.getdoc(reward_class(name)).split("\n\n")[0].replace("\n", " ").replace("|", "or")


def meanings(name: str) -> dict[str, str]:
    """What the class and its bases say of each of its options."""
    entry, found = re.compile(r"^    (\w+): (.*(?:\n      .*)*)", re.MULTILINE), {}
    for kind in reversed(reward_class(name).__mro__):
        _, _, listed = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
        found |= {option: " ".join(text.split()) for option, text in entry.findall(listed)}
    return found


def options(name: str) -> str:
    """Its options with their defaults, as JSON has them, and what they are."""
    said = meanings(name)
    found = [
        f"`{option}` {json.dumps(given.default)}: {said[option].removesuffix('.')}"
        for option, given in options_of(name).items()
        if option not in WIDGETS
    ]
    return ". ".join(found).replace("|", "or") or "none"


def possible(name: str) -> str:
    """The values that it can have."""
    bounds = reward_class(name).bounds
    low, high = bounds if isinstance(bounds, tuple) else (-math.inf, math.inf)
    ends = (math.isfinite(low), math.isfinite(high))
    return {
        (True, True): f"{low:g} to {high:g}",
        (True, False): f"from {low:g}",
        (False, True): f"up to {high:g}",
        (False, False): "any",
    }[ends]


def row(name: str) -> str:
    """Of the table of rewards, without its last cell: the usual range, which is written by hand."""
    return f"| `{name}` | {judged_by(name)} | {options(name)} | {possible(name)} |"


def file_row(name: str, file: WeightFile) -> str:
    """Of the table of files."""
    put = f"models/{file.folder}"
    return (
        f"| `{name}` | {file.name} | {put} | {file.size_told} | {file.licence_told} | {file.page} |"
    )


def table(title: str) -> list[str]:
    """The rows below a heading."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [line for line in text.splitlines() if line.startswith("| `")]


def test_every_reward_is_in_the_table_in_order():
    assert [line.split("`")[1] for line in table("Rewards")] == reward_names()


@pytest.mark.parametrize("name", reward_names())
def test_a_row_says_what_the_class_says(name):
    (line,) = (line for line in table("Rewards") if line.startswith(f"| `{name}` |"))
    assert line.startswith(row(name))
    usual = line.removeprefix(row(name)).strip(" |")
    assert usual


def test_files_are_the_catalogues():
    expected = [file_row(name, file) for name in REWARDS for file in of_reward(name)]
    assert table("Files") == expected
