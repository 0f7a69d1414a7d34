"""The inputs of PCPO Train in Background: checks, and the config that they make."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...registry import samplers
from ...trainers.config.train_config import ConfigError, TrainConfig, validate
from ...trainers.errors import UserError
from ...trainers.families.registry import FAMILIES, families_of_lora
from ...trainers.job.preflight import preflight
from ..errors import NodeError
from ..names import file_name
from .settings import Values

DOWN = re.compile(r"[._]lora(_A|_A\.default|_down|\.down)\.weight$")
OTHER = re.compile(r"[._](lora(_B|_B\.default|_up|\.up)\.weight|alpha)$")
TEXT = re.compile(r"(base_model\.model\.)?(lora_te|text_encoder)")
"""Names in a LoRA's file."""


# --- names ---------------------------------------------------------------------------------------


def lora_name(text: str) -> str:
    """A name that is a file's on every system, without its suffix.

    >>> lora_name(" my style.safetensors ")
    'my style'
    """
    return file_name(text.strip().removesuffix(".safetensors"), "the LoRA name")


# --- the LoRA to continue from -------------------------------------------------------------------


def check_init_lora(file: Path, rank: int, family: str | None = None) -> None:
    """Refuse a LoRA that a training cannot go on from, by its header.

    Args:
        rank: of the training.
        family: of the model; None where it is not known.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            names = list(opened.keys())
            downs = [key for key in names if DOWN.search(key)]
            ranks = [opened.get_slice(key).get_shape()[0] for key in downs]
    except (SafetensorError, OSError) as error:
        why = f"{file.name} cannot be read as a LoRA ({error})"
        raise NodeError(f"{why}; choose another") from error
    others = (key for key in names if not DOWN.search(key) and not OTHER.search(key))
    if (other := next(others, None)) is not None or not ranks:
        raise NodeError(
            f"{file.name} is not a plain LoRA ({other or 'it is empty'}); choose one that is, or "
            "put it on the MODEL with Load LoRA before training"
        )
    if any(TEXT.match(name) for name in names):
        raise NodeError(
            f"{file.name} also changes the text encoder, which training does not; choose a LoRA "
            "for the model only"
        )
    made_for = families_of_lora(names)
    if family is not None and made_for and family not in made_for:
        titles = " or ".join(FAMILIES[name].title for name in made_for)
        raise NodeError(
            f"{file.name} is a LoRA for {titles}, and this MODEL is {FAMILIES[family].title}; "
            "choose one that was made for it"
        )
    if max(ranks) > rank:
        raise NodeError(
            f"{file.name} has rank {max(ranks)} and the settings {rank}; set trainable_rank to "
            f"{max(ranks)} or more"
        )


# --- the config ----------------------------------------------------------------------------------


def config_of(settings: Values, changes: Mapping[str, Mapping[str, Any] | Any]) -> TrainConfig:
    """The settings, changed by the other inputs.

    Args:
        changes: to them; "rewards" as a whole, the other sections field by field.
    """
    values = dict(settings)
    for section, change in changes.items():
        values[section] = change if section == "rewards" else {**settings[section], **change}
    try:
        return validate(values, "the settings")
    except ConfigError as error:
        raise NodeError("; ".join(str(error).splitlines())) from error


def check_config(config: TrainConfig, family: str) -> None:
    """Refuse what the worker would refuse before it loads anything."""
    if config.run.device == "cpu" and config.model.precision == "float16":
        raise NodeError(
            "model_precision is 'float16', which a CPU cannot train in; use 'float32' or 'bfloat16'"
        )
    spec, chosen = FAMILIES[family], config.sampler.transition
    fitting = samplers(is_flow=spec.is_flow)
    if chosen not in fitting:
        mine, others = ("flow", "diffusion") if spec.is_flow else ("diffusion", "flow")
        raise NodeError(
            f"sampler_transition is '{chosen}', which is for {others} models; {spec.title} is "
            f"a {mine} model: use {' or '.join(map(repr, fitting))}"
        )
    try:
        preflight(config)
    except UserError as error:
        raise NodeError(str(error)) from error


def training_device(device: Any) -> tuple[str, str | None]:
    """The name of a job's device, and a note if it is not ComfyUI's own.

    Args:
        device: ComfyUI's, a `torch.device`.

    Returns:
        "cpu" or "cuda:0", and a sentence or None.
    """
    if device.type == "cuda":
        return f"cuda:{device.index or 0}", None
    if device.type == "cpu":
        return "cpu", None
    return "cpu", f"training runs on the CPU: it does not support devices of type '{device.type}'"
