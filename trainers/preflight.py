"""What a run needs and does not have, said before anything is loaded or written. No torch."""

from __future__ import annotations

from pathlib import Path

from .config import DEMO_FOLDER, REWARD_NAMES, ConfigError, TrainConfig
from .families import inspect_source
from .prompts import BUILT_IN, read_prompts

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
}


def preflight(config: TrainConfig, name: str = "the config") -> None:
    """Refuse a run that lacks its rewards, its model or its prompts.

    Args:
        config: the run, after the command line's changes.
        name: what to call it in an error, like "preset 'setting1'".

    Raises:
        ConfigError: naming what is missing and what to do (`ModelError` for the model's file).
    """
    for reward in config.rewards:
        if reward not in REWARD_NAMES:
            raise ConfigError(
                f"{name} needs the reward {reward!r}, which is not in this version; available: "
                f"{', '.join(REWARD_NAMES)} (--rewards NAME WEIGHT)"
            )
    source = config.model.source
    if source in CHECKPOINTS and not Path(source).exists():
        model, page, licence = CHECKPOINTS[source]
        raise ConfigError(
            f"{name} needs {model} (licence {licence}): get it, as one file or as a folder, from "
            f"{page} and give its path with --model.source FILE"
        )
    inspect_source(
        DEMO_FOLDER if source == "demo" else source, allow_download=config.model.allow_download
    )
    lora = config.trainable.init_lora
    if lora is not None and not Path(lora).is_file():
        raise ConfigError(f"trainable.init_lora is {lora!r}, which is no file; check the path")
    if config.prompts.source not in BUILT_IN:
        read_prompts(config.prompts.source)
