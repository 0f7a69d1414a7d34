"""LoRA files of SD1.x: how they name the modules of the UNet, and how one is read.

Written: kohya's form, `lora_unet_<path with underscores>.lora_down/up.weight` and `.alpha`, the one
that ComfyUI, A1111 and diffusers all read. Read: that form, and the ones of diffusers and peft
(`unet.<path>.lora_A/B.weight`, `.lora.down/up.weight`, `.processor.to_q_lora.down.weight`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ModelError

_ROLE = re.compile(
    r"^(?P<module>.+?)[._](?:"
    r"(?P<down>lora_down|lora_A|lora_A\.default|lora\.down)\.weight|"
    r"(?P<up>lora_up|lora_B|lora_B\.default|lora\.up)\.weight|"
    r"(?P<alpha>alpha))$"
)
_PREFIX = re.compile(r"^(?:base_model\.model\.)?(?:lora_unet_|unet\.)?")
_TEXT = re.compile(r"^(?:base_model\.model\.)?(?:lora_te|text_encoder)")


@dataclass(frozen=True)
class Delta:
    """The change of one module's weight: alpha / rank * up @ down.

    Attributes:
        down: (rank, in) or (rank, in, kernel, kernel).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: numerator of the scale.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def kohya_name(module: str) -> str:
    """The key of a UNet module in a LoRA file, without its ending."""
    return "lora_unet_" + module.replace(".", "_")


def read_lora(
    path: Path, modules: Iterable[str], *, ignore_text_encoder: bool = False
) -> dict[str, Delta]:
    """Read a LoRA file and sort its tensors by the module they change.

    Args:
        path: a .safetensors file.
        modules: paths of the network's modules.
        ignore_text_encoder: leave out what it changes in the text encoder, instead of refusing it.

    Returns:
        The changes, by module path.

    Raises:
        ModelError: when the file is damaged, is no plain LoRA, or was made for another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"the LoRA {path} cannot be read ({error}): check the path; it must be a complete "
            ".safetensors file"
        ) from error
    own = {key: tensor for key, tensor in tensors.items() if not _TEXT.match(key)}
    if len(own) < len(tensors) and not ignore_text_encoder:
        raise ModelError(
            f"the LoRA {path.name} also changes the text encoder, which is not trained here: "
            "choose one that does not, or ignore that part"
        )
    if not own:
        raise ModelError(f"{path.name} holds no LoRA of the denoising network: choose another")
    return _sort(own, modules, _stated_alpha(path, metadata))


def _stated_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    # diffusers notes alpha in the header, peft in a file beside; kohya has a tensor for it
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        config |= json.loads(beside.read_text(encoding="utf-8"))
    for prefix in ("unet.", ""):
        if config.get(f"{prefix}alpha_pattern"):
            raise ModelError(
                f"{path.name} notes an alpha of their own for some modules (alpha_pattern), which "
                "cannot be read here: convert it to kohya's format"
            )
        if f"{prefix}lora_alpha" in config:
            return float(config[f"{prefix}lora_alpha"])
    return None


def _sort(
    tensors: Mapping[str, Tensor], modules: Iterable[str], alpha: float | None
) -> dict[str, Delta]:
    paths = {path.replace(".", "_"): path for path in modules}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ROLE.match(key)
        if match is None:
            raise ModelError(
                f"the LoRA has a tensor {key}, which is no plain LoRA weight (LoKr, LoHa, DoRA and "
                "the like cannot be trained on): choose a plain LoRA"
            )
        role = next(role for role in ("down", "up", "alpha") if match[role])
        parts.setdefault(_find(match["module"], paths), {})[role] = tensor
    return {path: _delta(path, part, alpha) for path, part in parts.items()}


def _find(module: str, paths: Mapping[str, str]) -> str:
    flat = _PREFIX.sub("", module).replace(".processor", "").removesuffix("_lora").replace(".", "_")
    for candidate in (flat, f"{flat}_0"):  # to_out was once the name of to_out.0
        if candidate in paths:
            return paths[candidate]
    raise ModelError(
        f"the LoRA changes a module {module}, which this network does not have: it was made for "
        "another base model"
    )


def _delta(path: str, part: Mapping[str, Tensor], alpha: float | None) -> Delta:
    missing = {"down", "up"} - part.keys()
    if missing:
        raise ModelError(f"the LoRA lacks the {missing.pop()} weight of {path}: it is incomplete")
    down, up = part["down"].float(), part["up"].float()
    if up.shape[1] != down.shape[0]:
        raise ModelError(
            f"the LoRA's weights of {path} do not fit together: {tuple(down.shape)} and "
            f"{tuple(up.shape)}"
        )
    if "alpha" in part:
        alpha = float(part["alpha"])
    return Delta(down, up, float(len(down)) if alpha is None else alpha)
