"""Refuse a run that lacks something, before anything is loaded or written. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...registry import REWARDS, samplers
from ...remedies import command, install
from ..config.sections import ModelConfig
from ..config.train_config import DEMOS, ConfigError, TrainConfig
from ..families import Files, Source, inspect_source, judge_files
from ..families.files import FIELDS
from ..families.registry import FAMILIES, spec_of_source, titles
from ..families.sizes import check_sides
from ..families.spec import Checkpoint, FamilySpec
from ..reading import check_target, no_file, shown
from .locks import hold
from .prompts import BUILT_IN, WORDS, split_prompts


def model_source(source: str) -> str:
    """The folder of a demo model's name; any other source as it is."""
    return str(DEMOS.get(source, source))


def files_of(model: ModelConfig) -> Files:
    """The files of a model's parts."""
    given = {name: getattr(model, name) for name in FIELDS if name != "text_encoders"}
    return Files(
        Path(model_source(model.source)),
        tuple(map(Path, model.text_encoders)),
        **{name: None if path is None else Path(path) for name, path in given.items()},
    )


def options_of(model: ModelConfig) -> dict[str, Any]:
    """A model's options as `load_family` takes them."""
    return {
        "prediction_type": None if model.prediction_type == "auto" else model.prediction_type,
        "zero_snr": model.zero_terminal_snr,
        "allow_download": model.allow_download,
        "settings": model.model_dump(),
    }


def missing_checkpoint(source: str) -> Checkpoint | None:
    """The published model that a preset's `model.source` stands for; None for any other source."""
    spec = None if os.path.exists(source) else spec_of_source(source)
    return None if spec is None else spec.checkpoints.get(source)


def preflight(config: TrainConfig, name: str = "the config", *, has_prompts: bool = False) -> None:
    """Refuse a run that lacks its rewards, its model or its prompts.

    Args:
        config: of the run, after the command line's changes.
        name: of the config in an error, like "preset 'sd15-aesthetic'".
        has_prompts: the prompts are there, so that their files are not needed.

    Raises:
        ConfigError: naming what is missing and what to do (`ModelError` for the model's file).
    """
    check_rewards(config, name)
    source = config.model.source
    if (wanted := missing_checkpoint(source)) is not None:
        raise ConfigError(
            f"{name} needs {wanted.title} (licence {wanted.licence}): get it, as one file or as a "
            f"folder, from {wanted.page} and give its path with --model.source FILE"
        )
    found = inspect_source(model_source(source), allow_download=config.model.allow_download)
    if found.family is not None:
        judge_files(files_of(config.model), found)
        check_family(config, found.family)
    _check_distilled(config, found)
    _check_low_memory(config, found)
    lora = config.trainable.init_lora
    if lora is not None and (why := no_file(lora)):
        raise ConfigError(f"trainable.init_lora is {shown(lora)}, which {why}; check the path")
    if not has_prompts and {config.prompts.source, config.prompts.held_out} - {*BUILT_IN, *WORDS}:
        split_prompts(config.prompts, config.run.eval_prompts)
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            f"run.tensorboard is true, but tensorboard is not installed; run "
            f"{install('tensorboard')}, or set it to false"
        )


def check_rewards(config: TrainConfig, name: str) -> None:
    """Refuse rewards that are not in this version."""
    if config.guard.reward not in (None, *REWARDS):
        raise ConfigError(
            f"guard.reward is {config.guard.reward!r}, which is not in this version; available: "
            f"{', '.join(REWARDS)}"
        )
    for label, part in config.reward_parts.items():
        if part.name not in REWARDS:
            where = "" if part.name == label else f" (rewards.{label}.name)"
            raise ConfigError(
                f"{name} needs the reward {part.name!r}{where}, which is not in this version; "
                f"available: {', '.join(REWARDS)} (--rewards NAME WEIGHT)"
            )


def _check_distilled(config: TrainConfig, model: Source) -> None:
    """Refuse to train a distilled model unless that is wanted."""
    spec, named = FAMILIES.get(model.family or ""), Path(config.model.source)
    if spec is None or config.model.train_distilled:
        return
    if spec.is_distilled(named) or spec.is_distilled(model.path):
        raise ConfigError(why_not_distilled(spec, named.name, "model.train_distilled"))


def why_not_distilled(spec: FamilySpec, name: str, setting: str) -> str:
    """Why a distilled model is not trained, and what to do.

    Args:
        name: of its file.
        setting: that allows it all the same.
    """
    base = " or ".join(one.title for one in spec.checkpoints.values())
    return (
        f"{name} is distilled to a few steps, by its name: it is no flow model at other sigmas, "
        "and training breaks the distillation (blurred images were reported). Train "
        f"{base} and try its LoRA on this model, which sometimes works; or set {setting} to true"
    )


def _check_low_memory(config: TrainConfig, model: Source) -> None:
    """Refuse what the family does not have, and what needs a library that is not installed."""
    base, optimizer = config.model.base, config.optimizer.kind
    if model.family and "base" not in FAMILIES[model.family].options:
        offload = config.model.offload
        for field, value, is_asked, usual in (
            ("base", base, base != "same", "same"),
            ("offload", offload, offload == "blocks", "always"),
        ):
            if is_asked:
                raise ConfigError(
                    f"model.{field} is {value!r}, which is for {titles('base')}; set it to "
                    f"{usual!r}"
                )
    if find_spec("bitsandbytes") is None:
        for field, value, other in (
            ("model.base", base if base == "nf4" else None, "'fp8'"),
            ("optimizer.kind", optimizer if optimizer == "adamw8bit" else None, "'adamw'"),
        ):
            if value is not None:
                raise ConfigError(
                    f"{field} is {value!r}, but bitsandbytes is not installed; run "
                    f"{install('bitsandbytes')}, or set it to {other}"
                )


def check_family(config: TrainConfig, family: str) -> None:
    """Refuse settings that models of a family do not take, naming what to choose."""
    spec, model, transition = FAMILIES[family], config.model, config.sampler.transition
    fitting = samplers(is_flow=spec.is_flow)
    if transition not in fitting:
        mine, others = ("flow", "diffusion") if spec.is_flow else ("diffusion", "flow")
        raise ConfigError(
            f"sampler.transition is '{transition}', which is for {others} models; {family} is "
            f"a {mine} model: use {' or '.join(map(repr, fitting))}"
        )
    if model.t5_length is not None and "t5_length" not in spec.options:
        raise ConfigError(
            f"model.t5_length is {model.t5_length}, but {family} has no T5; leave it out"
        )
    try:
        check_sides(model.width or spec.multiple, model.height or spec.multiple, spec.multiple)
    except ValueError as error:
        raise ConfigError(f"the images' size, width and height: {error}") from error


def check_folder(root: Path) -> None:
    """Refuse a folder that holds a run or cannot be written to; it need not exist yet."""
    if os.path.exists(root / "job.json"):
        raise ConfigError(
            f"{root} holds a run already; go on with it by {command('resume', root)}, or choose "
            "another folder with --out"
        )
    check_target(root, "--out", is_folder=True)


@contextmanager
def hold_folder(out: Path, command: str) -> Iterator[None]:
    """Hold the folder that a command writes to, creating it; `ConfigError` if another process does.

    `command` is the word after `pcpo`.
    """

    def refusal(why: str) -> ConfigError:
        if why:
            return ConfigError(f"{out} cannot be worked in ({why}); choose another folder (--out)")
        return ConfigError(
            f"another process ({command}) works in {out}; wait for it, or choose another --out"
        )

    with hold(out, f"{command}.lock", refusal):
        yield
