"""LoRA files of any family: their tensors, sorted by the modules as the file names them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
        """Inner dimension."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def check_fits(self, name: str, down: Sequence[int], up: Sequence[int]) -> None:
        """Refuse it where a module has other shapes.

        Args:
            name: of the module.
            down: the shape that `down` must have.
            up: the same for `up`.

        Raises:
            ModelError: naming both shapes.
        """
        for part, ours, theirs in (("down", down, self.down), ("up", up, self.up)):
            if _core(ours) != _core(theirs.shape):
                raise ModelError(
                    f"the LoRA's {part} weight of {name} is {tuple(theirs.shape)} where the "
                    f"network needs {tuple(ours)}: it was made for another base model"
                )


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape; a convolution by 1 x 1 is the same as a linear layer."""
    return tuple(shape[:2] if tuple(shape[2:]) == (1, 1) else shape)


def read_deltas(path: Path, *, ignore_text_encoder: bool = False) -> dict[str, Delta]:
    """Read a LoRA file and sort its tensors by the module they change.

    Args:
        path: a .safetensors file.
        ignore_text_encoder: leave out what it changes in text encoders, instead of refusing it.

    Returns:
        The changes, by the modules' names in the file.

    Raises:
        ModelError: when the file is damaged or is no plain LoRA.
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
    alpha = _stated_alpha(path, metadata)
    return {module: _delta(module, part, alpha) for module, part in _sorted(own).items()}


def _stated_alpha(path: Path, metadata: Mapping[str, str]) -> float | None:
    # diffusers notes alpha in the header, peft in a file beside; kohya has a tensor for it
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.is_file():
        config |= json.loads(beside.read_text(encoding="utf-8"))
    for prefix in ("unet.", "transformer.", ""):
        if config.get(f"{prefix}alpha_pattern"):
            raise ModelError(
                f"{path.name} notes an alpha of their own for some modules (alpha_pattern), which "
                "cannot be read here: convert it to kohya's format"
            )
        if f"{prefix}lora_alpha" in config:
            return float(config[f"{prefix}lora_alpha"])
    return None


def _sorted(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ROLE.match(key)
        if match is None:
            raise ModelError(
                f"the LoRA has a tensor {key}, which is no plain LoRA weight (LoKr, LoHa, DoRA and "
                "the like cannot be trained on): choose a plain LoRA"
            )
        role = next(role for role in ("down", "up", "alpha") if match[role])
        parts.setdefault(match["module"], {})[role] = tensor
    return parts


def _delta(module: str, part: Mapping[str, Tensor], alpha: float | None) -> Delta:
    missing = {"down", "up"} - part.keys()
    if missing:
        raise ModelError(f"the LoRA lacks the {missing.pop()} weight of {module}: it is incomplete")
    down, up = part["down"].float(), part["up"].float()
    if up.shape[1] != down.shape[0]:
        raise ModelError(
            f"the LoRA's weights of {module} do not fit together: {tuple(down.shape)} and "
            f"{tuple(up.shape)}"
        )
    if "alpha" in part:
        alpha = float(part["alpha"])
    return Delta(down, up, float(len(down)) if alpha is None else alpha)
