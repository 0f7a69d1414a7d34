"""Rewards as words of a command line. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..reading import json_or_text
from .train_config import ConfigError, RewardConfig

OWN = set(RewardConfig.model_fields) - {"options"}
"""Settings of a reward in a run; every other name is an option of the reward itself."""


def rewards_of(words: Sequence[str], options: Sequence[str] = ()) -> dict[str, Any]:
    """The config's section `rewards`, as in a config file, not yet validated.

    >>> rewards_of(["scene", "remote:0.5"], ["remote.url=http://10.0.0.2:8765"])
    {'scene': 1.0, 'remote': {'weight': 0.5, 'options': {'url': 'http://10.0.0.2:8765'}}}

    Args:
        options: NAME.OPTION=VALUE; the value is JSON if it can be parsed, else a text.

    Raises:
        ConfigError: if a word cannot be read, or an option's reward is not among the words.
    """
    rewards: dict[str, Any] = {}
    for word in words:
        name, _, weight = word.partition(":")
        if name in rewards:
            raise ConfigError(f"the reward {name!r} is given twice; add its weights up")
        rewards[name] = _weight(word, weight) if weight else 1.0
    return with_options(rewards, options)


def with_options(rewards: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    """A new section with options, as in `rewards_of`, added.

    Raises:
        ConfigError: if an option cannot be read, or its reward is not there.
    """
    changed = dict(rewards)
    for text in options:
        where, equals, value = text.partition("=")
        name, _, option = where.partition(".")
        if not (equals and option):
            raise ConfigError(f"{text!r} is no option; write NAME.OPTION=VALUE")
        if name not in changed:
            there = ", ".join(changed)
            raise ConfigError(f"{text!r} is an option of {name!r}, but the rewards are {there}")
        part = changed[name] if isinstance(changed[name], dict) else {"weight": changed[name]}
        if option in OWN:
            changed[name] = {**part, option: json_or_text(value, where)}
        else:
            changed[name] = {
                **part,
                "options": {**part.get("options", {}), option: json_or_text(value, where)},
            }
    return changed


def _weight(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{word!r}: {text!r} is no weight; write NAME:WEIGHT") from error
