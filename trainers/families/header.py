"""Read the header of a single checkpoint file: names, shapes, dtypes. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import ModelError

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model.transformer."

SAFETENSORS = (".safetensors", ".sft")

VAE_ENTRIES = ("decoder.conv_in.weight", "taesd_decoder.1.weight")
_VAE_PREFIXES = (VAE, "vae.", "")
NETWORK_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Of a network's names: in a checkpoint, in a network's file as some save it, and as published."""

# Marks of weights that are stored as codes with a scale beside them.
_QUANT_SUFFIXES = (
    ".scale_weight",
    ".weight_scale",
    ".weight_scale_2",
    ".comfy_quant",
    ".absmax",
    ".scaled_fp8",
)


@dataclass(frozen=True, slots=True)
class Header:
    """The table of contents of a checkpoint.

    Attributes:
        name: the file's name, for messages.
        dtypes: by tensor name, as safetensors calls them ("F16", "F8_E4M3", ...).
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def under(self, prefix: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors below a prefix, named without it."""
        return {k[len(prefix) :]: s for k, s in self.shapes.items() if k.startswith(prefix)}


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file; `ModelError` if it is not a complete one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            shapes = {key: tuple(s.get_shape()) for key, s in slices.items()}
            dtypes = {key: s.get_dtype() for key, s in slices.items()}
            return Header(path.name, shapes, dtypes, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path.name} is not a complete safetensors file ({error}): download it again"
        ) from error


def judge_start(path: Path) -> None:
    """Refuse GGUF, and what torch cannot have pickled, by a file's first bytes.

    A complete safetensors file passes: its header is checked later.
    """
    start = path.open("rb").read(4)
    if start == b"GGUF":
        raise ModelError(
            f"{path.name} is a GGUF file, whose quantised weights cannot be trained here: "
            "choose the fp16 or fp32 .safetensors of the same model"
        )
    if path.suffix.lower() in SAFETENSORS:
        return
    if start != b"PK\x03\x04" and start[:1] != b"\x80":
        raise ModelError(f"{path.name} is damaged or no checkpoint: download it again")


def prefix_before(
    header: Header, names: Sequence[str], prefixes: Sequence[str] = NETWORK_PREFIXES
) -> str | None:
    """The first prefix that stands before one of some names in a file; None if none does."""
    pairs = ((prefix, name) for prefix in prefixes for name in names)
    return next((prefix for prefix, name in pairs if prefix + name in header.shapes), None)


def vae_prefix(header: Header) -> str | None:
    """The prefix of a file's autoencoder; None if it holds none."""
    return prefix_before(header, VAE_ENTRIES, _VAE_PREFIXES)


def judge_vae(header: Header, channels: int, remedy: str) -> None:
    """Refuse a file without an autoencoder, or with one of other latent channels than a model's.

    `remedy` says what to give, for messages.
    """
    prefix = vae_prefix(header)
    if prefix is None:
        raise ModelError(f"{header.name} holds no VAE: {remedy}")
    shapes = header.under(prefix)
    found = next(shapes[entry][1] for entry in VAE_ENTRIES if entry in shapes)
    if found != channels:
        raise ModelError(
            f"the VAE in {header.name} has {found} latent channels and the network takes "
            f"{channels}: it belongs to another model; {remedy}"
        )


def _has(*parts: str) -> Callable[[Header], bool]:
    return lambda header: any(part in key for key in header.shapes for part in parts)


def _is_sd2(header: Header) -> bool:
    context = [s[1] for k, s in header.shapes.items() if k.endswith("attn2.to_k.weight")]
    return _has("cond_stage_model.model.")(header) or 1024 in context


def _is_quantised(header: Header) -> bool:
    coded = any(k.endswith(".weight") and d in ("U8", "I8") for k, d in header.dtypes.items())
    return coded or any(f".{key}".endswith(_QUANT_SUFFIXES) for key in header.shapes)


# In this order: the first that holds is what the file is.
_OTHERS: tuple[tuple[str, Callable[[Header], bool]], ...] = (("SD2.x", _is_sd2),)


def known_as(header: Header) -> str | None:
    """The name of a family that is known and not supported; None for other files."""
    return next((other for other, matches in _OTHERS if matches(header)), None)


def judge_lora(header: Header) -> None:
    """Refuse a LoRA of any family."""
    if _has(".lora_down.", ".lora_up.", ".lora_A.", ".lora.down.", ".hada_", ".lokr_")(header):
        raise ModelError(
            f"{header.name} is a LoRA, not a model: choose the base model it was made for"
        )


def judge_quantised(header: Header) -> None:
    """Refuse weights that are stored as codes."""
    if _is_quantised(header):
        raise ModelError(
            f"{header.name} holds quantised weights (nvfp4, scaled fp8, int8 or nf4), which cannot "
            "be trained here: choose the fp16 or fp32 file of the same model"
        )


def judge_unknown(header: Header, supported: str) -> ModelError:
    """What is wrong with a file that no family takes, and what to do.

    `supported` is a sentence on the models that can be trained.
    """
    name, shapes = header.name, header.shapes
    if other := known_as(header):
        return ModelError(f"{name} is a {other} model, which is not supported. {supported}")
    judge_quantised(header)
    if _has("down_blocks.0.resnets.")(header):
        return ModelError(
            f"{name} is one part of a model in diffusers format: give the folder that has "
            "model_index.json in it"
        )
    if "input_blocks.0.0.weight" in shapes:
        return ModelError(
            f"{name} holds the denoising network alone, without text encoder and VAE: choose a "
            "whole checkpoint"
        )
    first = next(iter(shapes), "nothing")
    return ModelError(f"{name} is no model known here (it begins with {first}). {supported}")
