"""What a LoRA file says of the model that it was trained on, in the words that LoRA managers read.

A1111 and Forge sort LoRAs by `ss_base_model_version` and show `ss_sd_model_name`, the model's file;
tools that read ModelSpec show its tags.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Any

from ..families import Family
from ..families.header import SAFETENSORS, read_header
from ..families.registry import FAMILIES
from ..families.scheduler import SchedulerConfig

TITLES = ("modelspec.title", "ss_output_name", "ss_sd_model_name")
"""Notes of a checkpoint that name it, or what it was made from."""

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def notes_on_base(family: Family, source: str) -> dict[str, Any]:
    """Entries of a LoRA's metadata on its base.

    Args:
        family: the model, loaded.
        source: where it came from: a file, a folder or a name.
    """
    name = PureWindowsPath(source).name  # of a path of either system
    notes: dict[str, Any] = {"ss_base_model_version": family.base_model_version}
    notes["ss_sd_model_name"] = name
    if isinstance(schedule := family.schedule, SchedulerConfig):
        predicted = schedule.prediction_type
        notes["ss_v_parameterization"] = str(predicted == "v_prediction")
        notes["ss_zero_terminal_snr"] = str(schedule.rescale_betas_zero_snr)
        if predicted in _PREDICTIONS:
            notes["modelspec.prediction_type"] = _PREDICTIONS[predicted]
    if relative := _relative(family.name, name, Path(source)):
        notes["modelspec.tags"] = relative
    return notes


def marks_of(family: Family) -> tuple[str, ...]:
    """The marks in a file by which ComfyUI knows what the whole network predicts."""
    schedule = family.schedule
    if not isinstance(schedule, SchedulerConfig):
        return ()
    kind, ends_in_noise = schedule.prediction_type, schedule.rescale_betas_zero_snr
    return FAMILIES[family.name].comfyui.marks(kind, ends_in_noise=ends_in_noise)


def _relative(family: str, name: str, file: Path) -> str | None:
    """The well-known model that a file is, or was made from, by its name or its own notes."""
    texts = [name]
    if file.suffix.lower() in SAFETENSORS and file.is_file():
        metadata = read_header(file).metadata
        texts += [metadata.get(note, "") for note in TITLES]
    relatives = FAMILIES[family].relatives.items()
    found = (title for text in texts for title, words in relatives if re.search(words, text))
    return next(found, None)
