"""Refuse a run that lacks something, before anything is loaded or written. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ...remedies import command, install
from ..config.train_config import DEMOS, REWARD_NAMES, ConfigError, ModelConfig, TrainConfig
from ..families import Files, Source, inspect_source, judge_files
from ..families.sizes import MULTIPLES, check_sides
from ..reading import check_target, no_file, shown
from .locks import hold
from .prompts import BUILT_IN, WORDS, split_prompts

# name in a preset -> what to pass: name, where it is, its licence
CHECKPOINTS = {
    "sd14": (
        "Stable Diffusion 1.4",
        "https://huggingface.co/CompVis/stable-diffusion-v1-4",
        "CreativeML OpenRAIL-M",
    ),
    "sd15": (
        "Stable Diffusion 1.5",
        "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CreativeML OpenRAIL-M",
    ),
    "sd35-medium": (
        "Stable Diffusion 3.5 Medium",
        "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium",
        "Stability AI Community License",
    ),
    "flux1-dev": (
        "FLUX.1-dev",
        "https://huggingface.co/black-forest-labs/FLUX.1-dev",
        "FLUX.1 [dev] Non-Commercial License",
    ),
}


def model_source(source: str) -> str:
    """The folder of a demo model's name; any other source as it is."""
    return str(DEMOS.get(source, source))


def files_of(model: ModelConfig) -> Files:
    """The files of a model's parts."""
    return Files(
        Path(model_source(model.source)),
        tuple(map(Path, model.text_encoders)),
        None if model.vae is None else Path(model.vae),
        None if model.t5_tokenizer is None else Path(model.t5_tokenizer),
    )


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
    if source in CHECKPOINTS and not os.path.exists(source):
        model, page, licence = CHECKPOINTS[source]
        raise ConfigError(
            f"{name} needs {model} (licence {licence}): get it, as one file or as a folder, from "
            f"{page} and give its path with --model.source FILE"
        )
    found = inspect_source(model_source(source), allow_download=config.model.allow_download)
    if found.kind != "pickle":  # whose family is known only to torch
        judge_files(files_of(config.model), found)
        check_family(config, found.family)
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
    if config.guard.reward not in (None, *REWARD_NAMES):
        raise ConfigError(
            f"guard.reward is {config.guard.reward!r}, which is not in this version; available: "
            f"{', '.join(REWARD_NAMES)}"
        )
    for label, part in config.judges.items():
        if part.name not in REWARD_NAMES:
            where = "" if part.name == label else f" (rewards.{label}.name)"
            raise ConfigError(
                f"{name} needs the reward {part.name!r}{where}, which is not in this version; "
                f"available: {', '.join(REWARD_NAMES)} (--rewards NAME WEIGHT)"
            )


def _check_low_memory(config: TrainConfig, model: Source) -> None:
    """Refuse a base that the family does not have, and one whose library is not installed."""
    base, optimizer = config.model.base, config.optimizer.kind
    if base != "same" and model.family == "sd1" and model.kind != "pickle":
        raise ConfigError(
            f"model.base is {base!r}, which is for SD3, SD3.5 and FLUX; set it to 'same'"
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
    model, transition, is_flow = config.model, config.sampler.transition, family in MULTIPLES
    if (transition != "ddim") != is_flow:
        mine, others = ("a flow model", "diffusion") if is_flow else ("a diffusion model", "flow")
        use = "'dance_sde', 'flow_sde' or 'cps'" if is_flow else "'ddim'"
        raise ConfigError(
            f"sampler.transition is '{transition}', which is for {others} models; {family} is "
            f"{mine}: use {use}"
        )
    if not is_flow and model.t5_length is not None:
        raise ConfigError(
            f"model.t5_length is {model.t5_length}, but {family} has no T5; leave it out"
        )
    if is_flow:
        own = MULTIPLES[family]
        try:
            check_sides(model.width or own, model.height or own, own)
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
def held(out: Path, command: str) -> Iterator[None]:
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
