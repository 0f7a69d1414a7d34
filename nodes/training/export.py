"""A job's LoRA as a file of its own, or merged into a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from ...pcpo.row_lora import stored_in
from ...trainers.families.text.header import TOKENIZERS
from ...trainers.job.files import replace_file
from ...trainers.job.folder import JobFolder
from ..demo.nodes import demo_id_of
from ..errors import NodeError
from ..families import base_of, base_title
from ..handover.write import Tick, checkpoint_of, write_checkpoint
from ..host import num_patches
from ..jobs.view import name_of
from ..names import checked_lora, free_name, lora_file

PATHS = (
    *(("model", "source"), ("model", "text_encoders"), ("model", "vae")),
    *(("model", tokenizer.field) for tokenizer in TOKENIZERS.values()),
    *(("prompts", "source"), ("prompts", "held_out"), ("trainable", "init_lora")),
)
"""Fields of a config that may be files of this computer."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def free_file(folder: Path, name: str) -> Path:
    """A file that is not there yet: NAME, NAME-2, NAME-3 ..."""
    return lora_file(folder, free_name(name, lambda found: lora_file(folder, found).exists()))


def notes_of(folder: JobFolder, file: Path) -> dict[str, str]:
    """What the header of an export says of where it comes from.

    Returns:
        The LoRA's own entries, the job's id, name and config; of files the names alone.
    """
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as opened:
        own = opened.metadata() or {}
    config = json.dumps(_portable(folder.job()["config"]), sort_keys=True)
    about = {"pcpo_job": folder.root.name, "pcpo_name": name_of(folder), "pcpo_config": config}
    return own | about


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """A config without the folders of this computer."""
    found = {section: value for section, value in config.items() if section != "run"}
    found["run"] = {key: value for key, value in config["run"].items() if key != "publish"}
    for section, field in PATHS:
        if field in found[section]:
            found[section] = {**found[section], field: _bare(found[section][field])}
    return found


def _bare(given: Any) -> Any:
    """Paths as the names of their files, and all else as it is."""
    if isinstance(given, list | tuple):
        return [_bare(one) for one in given]
    return PurePath(given).name if given and PurePath(given).is_absolute() else given


def export_lora(folder: JobFolder, file: Path, target: Path, dtype: torch.dtype) -> None:
    """Write a LoRA in a dtype.

    Args:
        target: the new file; must not exist.
    """
    from safetensors.torch import load_file, save_file

    tensors = stored_in(checked_lora(load_file(file), file.name), dtype)
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        kind = str(dtype).removeprefix("torch.")
        raise NodeError(f"some weights are too large for {kind}; choose float32 or bfloat16")
    with replace_file(target) as fresh:
        save_file(tensors, fresh, metadata=notes_of(folder, file))


def export_merged(
    folder: JobFolder, file: Path, target: Path, parts: tuple[Any, Any, Any], tick: Tick
) -> None:
    """Write a checkpoint with a LoRA merged into it.

    Args:
        target: the new file; must not exist.
    """
    model, clip, vae = parts
    if any(part is None for part in parts):
        raise NodeError("a merged checkpoint needs model, clip and vae; connect all three")
    if demo_id_of(model) is not None:
        raise NodeError("the demo model is too small for a checkpoint file; export its LoRA")
    tuned = with_lora(folder, file, model, None, 1.0)[0]
    tensors = checkpoint_of(tuned, clip, vae, None)
    write_checkpoint(target, tensors, tick, notes_of(folder, file))


def read_lora(file: Path) -> dict[str, Tensor]:
    """A LoRA's tensors, as ComfyUI's own LORA_MODEL holds them."""
    from safetensors.torch import load_file

    return checked_lora(load_file(file), file.name)


def with_lora(
    folder: JobFolder, file: Path, model: Any, clip: Any, strength: float
) -> tuple[Any, Any]:
    """Put a job's LoRA on a MODEL by ComfyUI's own functions.

    Args:
        clip: a CLIP, or None.
        strength: 1 as trained.
    """
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    trained, found = folder.read("job.json").get("inputs", {}).get("base"), base_of(model)
    if trained and found and trained != found:
        raise NodeError(
            f"the job {name_of(folder)!r} was trained on {base_title(trained)}, and this MODEL is "
            f"{base_title(found)}; connect the one it was trained on"
        )
    lora, notes = load_torch_file(str(file), safe_load=True, return_metadata=True)
    lora = checked_lora(lora, file.name)
    tuned, text = load_lora_for_models(model, clip, lora, strength, strength, lora_metadata=notes)
    if num_patches(tuned) == num_patches(model):
        raise NodeError(
            f"no weight of the LoRA of {name_of(folder)!r} fits this MODEL; connect "
            f"{base_title(trained)}"
        )
    return tuned, text
