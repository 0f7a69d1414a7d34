"""The arguments of the commands that take a run's config, and change it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from ..reading import shown
from . import bounds
from .arguments import POSITIONAL, Arguments, Word
from .bounds import Processes
from .reward_options import with_options
from .sections import TrainFields
from .train_config import (
    ConfigError,
    TrainConfig,
    merge,
    presets,
    read_config,
    read_preset,
    validate,
)


class ConfigArguments(TrainFields, Arguments):
    """A config file or a preset, and changes to it."""

    config: Annotated[str | None, POSITIONAL] = Field(default=None, description="a config file")
    preset: str | None = Field(default=None, description=f"one of {', '.join(presets())}")
    rewards: list[str] = Field(
        default=[], description="NAME WEIGHT ...: the rewards, instead of the config's"
    )
    reward_options: list[str] = Field(default=[], description="NAME.OPTION=VALUE ...")

    @classmethod
    def usual(cls, given: Mapping[str, Any]) -> str | None:
        """The preset if neither a file nor a preset is named."""
        return None

    @classmethod
    def base_config(cls, given: Mapping[str, Any]) -> tuple[TrainConfig, str] | None:
        """The config that is to be changed, and its name."""
        file, preset = given.get("config"), given.get("preset")
        if file and preset:
            raise ConfigError("give a config file or --preset, not both")
        if file:
            return read_config(file), Path(file).stem
        preset = preset or cls.usual(given)
        return (read_preset(preset), preset) if preset else None

    @classmethod
    def defaults(cls, given: Mapping[str, Any]) -> Self:
        chosen = cls.base_config(given)
        return cls.model_construct(**dict(chosen[0]) if chosen else {})

    def read(self) -> tuple[TrainConfig, str]:
        """The changed config, and its name.

        Raises:
            ConfigError: if there is no such config, or the changes are not allowed together.
        """
        if (chosen := self.base_config(dict(self))) is None:
            raise ConfigError(f"give a config file or --preset NAME, one of {', '.join(presets())}")
        given = self.model_dump(exclude_unset=True, include={*TrainFields.model_fields})
        values = merge(chosen[0].model_dump(), given)
        rewards = _weights(self.rewards) if self.rewards else values["rewards"]
        values["rewards"] = with_options(rewards, self.reward_options)
        return validate(values, "the command line"), chosen[1]


class TrainArguments(ConfigArguments):
    """Train from a config file or a preset."""

    out: str | None = Field(default=None, description="folder of the run; by default in runs/")
    num_processes: Processes = Field(default=None, description="processes on this machine")
    dry_run: bool = Field(default=False, description="only estimate memory and time")
    card_gb: float | None = Field(
        default=None, gt=0, lt=bounds.LARGE, description="memory of the card to plan for, in GB"
    )


class DemoArguments(TrainArguments):
    """Align a shipped tiny model: minutes on two cores."""

    shipped: Annotated[Literal["tiny-flow", "tiny-sd"], "--model"] = Field(
        default="tiny-flow", description="the model; its preset is 'demo-flow' or 'demo'"
    )

    @classmethod
    def usual(cls, given: Mapping[str, Any]) -> str:
        return "demo" if given.get("shipped") == "tiny-sd" else "demo-flow"


class ResumeArguments(Arguments):
    """Resume a run from its last checkpoint."""

    run: Word = Field(description="folder of the run")
    iterations: int | None = Field(
        default=None, ge=1, le=bounds.ITERATIONS, description="new number of iterations in all"
    )
    server: str | None = Field(
        default=None, description="folder of ComfyUI's jobs, whose locks to heed"
    )
    num_processes: Processes = Field(default=None, description="processes on this machine")


def _weights(words: list[str]) -> dict[str, float]:
    """NAME WEIGHT NAME WEIGHT ... as a table."""
    try:
        return {n: float(w) for n, w in zip(words[::2], words[1::2], strict=True)}
    except ValueError as error:
        raise ConfigError(f"--rewards takes NAME WEIGHT pairs, not {shown(words)}") from error
