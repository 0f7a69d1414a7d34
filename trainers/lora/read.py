"""LoRA files of any family: their tensors, grouped by the modules as the file names them."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..families.errors import ModelError
from ..families.weights import check_finite

log = logging.getLogger(__name__)

_NOTED = "lora_adapter_metadata"  # the entry of the header that diffusers writes and reads
_NETWORK = re.compile(r"^(?:base_model\.model\.)?(?:unet\.|transformer\.|diffusion_model\.)?")
_ROLE = re.compile(
    r"^(?P<module>.+?)[._](?:"
    r"(?P<down>lora_down|lora_A|lora_A\.default|lora\.down)\.weight|"
    r"(?P<up>lora_up|lora_B|lora_B\.default|lora\.up)\.weight|"
    r"(?P<alpha>alpha))$"
)
_TEXT = re.compile(r"^(?:base_model\.model\.)?(?:lora_te|text_encoder|clip_[lg]\.|t5xxl\.)")


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
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check_fits(self, name: str, down: Sequence[int], up: Sequence[int]) -> None:
        """Refuse the change if a module has other shapes, naming both."""
        for part, ours, theirs in (("down", down, self.down), ("up", up, self.up)):
            if _core(ours) != _core(theirs.shape):
                raise ModelError(
                    f"the LoRA's {part} weight of {name} is {tuple(theirs.shape)} where the "
                    f"network needs {tuple(ours)}: it was made for another base model"
                )


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape; a convolution by 1 x 1 counts as a linear layer."""
    return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)


def read_deltas(path: Path, *, ignore_text_encoder: bool = False) -> dict[str, Delta]:
    """Read a LoRA file's changes by the modules' names in the file.

    Args:
        ignore_text_encoder: skip changes of text encoders, instead of refusing them.

    Raises:
        ModelError: if the file is damaged or is no plain LoRA.
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
            f"the LoRA {path.name} also changes the text encoder, which is not changed here: "
            "choose one that does not, or use it in ComfyUI, whose Load LoRA changes both"
        )
    if not own:
        raise ModelError(f"{path.name} holds no LoRA of the denoising network: choose another")
    check_finite(own, f"the LoRA {path.name}")
    parts = _sort_by_layout(own)
    if all("alpha" in part for part in parts.values()):
        return {module: _delta(module, part, None) for module, part in parts.items()}
    config = _peft_config(path, metadata)
    deltas = {module: _delta(module, part, config) for module, part in parts.items()}
    for module, delta in deltas.items():
        if not math.isfinite(delta.scale):
            raise ModelError(
                f"the LoRA {path.name} states an alpha of {delta.alpha} for {module}: choose "
                "another"
            )
    _say_scales(
        path, {deltas[module].scale for module, part in parts.items() if "alpha" not in part}
    )
    return deltas


def _peft_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's LoraConfig of the network: from the header, or from a file beside it."""
    where, text = f"its header's entry {_NOTED!r}", metadata.get(_NOTED)
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        where, text = (
            f"{beside.name} beside it",
            beside.read_text(encoding="utf-8", errors="replace"),
        )
    try:
        noted = json.loads(text or "{}")
        for prefix in ("unet.", "transformer.", ""):
            own = {k.removeprefix(prefix): v for k, v in noted.items() if k.startswith(prefix)}
            if own.keys() & {"r", "lora_alpha", "use_rslora"}:
                alphas = {k: float(v) for k, v in (own.get("alpha_pattern") or {}).items()}
                for pattern in alphas:
                    re.compile(pattern)
                own["alpha_pattern"], own["lora_alpha"] = alphas, float(own.get("lora_alpha", 8))
                return own
    except (
        ArithmeticError,
        AttributeError,
        RecursionError,
        TypeError,
        ValueError,
        re.error,
    ) as error:
        raise ModelError(
            f"the LoRA {path.name} has no alpha of its own, and {where}, which should have it, is "
            f"no configuration of peft's ({error}): save it again from where it was trained"
        ) from error
    return {}


def _alpha(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """The alpha of a module without one of its own, as diffusers and peft determine it.

    A rank-stabilised LoRA is scaled by alpha / sqrt(rank), here that root times as much / rank.
    """
    if not config:
        return float(rank)
    patterns = config["alpha_pattern"]
    pattern = get_pattern_key(list(patterns), _NETWORK.sub("", module))
    alpha = patterns.get(pattern, config["lora_alpha"])
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _say_scales(path: Path, scales: set[float]) -> None:
    """Warn, because ComfyUI reads neither of the two places where `_peft_config` looks."""
    if any(abs(scale - 1) > 1e-6 for scale in scales):
        said = ", ".join(f"{scale:g}" for scale in sorted(scales)[:4])
        log.warning(
            f"the LoRA {path.name} is applied at the scale that its metadata states ({said}), as "
            "diffusers does; ComfyUI does not read it and applies 1"
        )


def _sort_by_layout(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ROLE.match(key)
        if match is None:
            raise ModelError(
                f"the LoRA has a tensor {key}, which is no plain LoRA weight (LoKr, LoHa, DoRA, "
                "and the biases and norms of ComfyUI's own trainer cannot be trained on): choose a "
                "plain LoRA, or in ComfyUI put it on the MODEL with Load LoRA and train that MODEL"
            )
        role = next(role for role in ("down", "up", "alpha") if match[role])
        parts.setdefault(match["module"], {})[role] = tensor
    return parts


def _delta(module: str, part: Mapping[str, Tensor], config: Mapping[str, Any] | None) -> Delta:
    missing = {"down", "up"} - part.keys()
    if missing:
        raise ModelError(f"the LoRA lacks the {missing.pop()} weight of {module}: it is incomplete")
    down, up = part["down"].float(), part["up"].float()
    if min(down.ndim, up.ndim) < 2 or up.shape[1] != len(down) or not up.numel():
        raise ModelError(
            f"the LoRA's weights of {module} do not fit together: {tuple(down.shape)} and "
            f"{tuple(up.shape)}"
        )
    if "alpha" not in part:
        return Delta(down, up, _alpha(module, len(down), config or {}))
    if part["alpha"].numel() != 1:
        raise ModelError(
            f"the LoRA's alpha of {module} is {part['alpha'].numel()} numbers, not one"
        )
    return Delta(down, up, float(part["alpha"]))
