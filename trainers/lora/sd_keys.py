"""LoRA files of SD1.x: their names for the UNet's modules, and how one is read.

Written: kohya's form, `lora_unet_<path with underscores>.lora_down/up.weight` and `.alpha`, the one
that ComfyUI, A1111 and diffusers all read. Read: that form, and the ones of diffusers and peft
(`unet.<path>.lora_A/B.weight`, `.lora.down/up.weight`, `.processor.to_q_lora.down.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..families.errors import ModelError
from .read import Delta, read_deltas

_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:lora_unet_|unet\.)?")


def tensor_names(module: str) -> tuple[str, str, str]:
    """Names in a file of the tensors that change a module: down, up and alpha."""
    key = "lora_unet_" + module.replace(".", "_")
    return f"{key}.lora_down.weight", f"{key}.lora_up.weight", f"{key}.alpha"


def read_lora(
    path: Path, modules: Iterable[str], *, ignore_text_encoder: bool = False
) -> dict[str, Delta]:
    """Read a LoRA file's changes by the path of the module that they change.

    `ModelError` if the file is damaged, is no plain LoRA, was made for another network, or changes
    the text encoder without `ignore_text_encoder`.
    """
    paths = {name.replace(".", "_"): name for name in modules}
    deltas = read_deltas(path, ignore_text_encoder=ignore_text_encoder)
    return {_find(module, paths): delta for module, delta in deltas.items()}


def _find(module: str, paths: Mapping[str, str]) -> str:
    flat = _PREFIX.sub("", module).replace(".processor", "").removesuffix("_lora").replace(".", "_")
    for candidate in (flat, f"{flat}_0"):  # to_out was once the name of to_out.0
        if candidate in paths:
            return paths[candidate]
    raise ModelError(
        f"the LoRA changes a module {module}, which this network does not have: it was made for "
        "another base model"
    )
