"""Adapters: put them on a network, switch them off for the reference, write and read them.

An adapter adds alpha / rank * B A to a frozen weight. A and B are float32 over a base of any dtype.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...pcpo.row_lora import stored_in
from ..families.errors import ModelError
from ..families.registry import FAMILIES, spec_of_class
from ..families.spec import FamilySpec
from ..families.unet_names import original_names
from . import keys
from .read import Delta
from .safetensors_file import write_safetensors

ADAPTER = "default"

# --- on the network ------------------------------------------------------------------------------


def add_lora(
    network: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    init: Literal["gaussian", "default"] = "gaussian",
    *,
    seed: int | None = None,
) -> list[nn.Parameter]:
    """Put fresh adapters on a network and freeze everything else; its output does not change.

    Args:
        rank: inner dimension, >= 1.
        alpha: the adapters' output is scaled by alpha / rank; > 0.
        targets: module names, or the ends of their paths ("to_q").
        init: of A: "gaussian" with std 1 / rank, as DDPO does, or "default", peft's
            Kaiming-uniform. B starts at zero.
        seed: draws A independently of torch's global generator, which then stays untouched.

    Returns:
        The trainable parameters, float32, in the network's order.

    Raises:
        ValueError: if a setting is out of range, a target matches nothing, or there are adapters
            already.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"rank is {rank} and alpha {alpha}; rank must be >= 1 and alpha > 0")
    if dict(adapters(network)):
        raise ValueError("the network has adapters already: load a fresh one, or use these")
    check_targets(network, targets)
    # in full: the end of a path may also be that of a list of modules, which takes no adapter
    chosen = [n for n in module_names(network) if any(f".{n}".endswith(f".{t}") for t in targets)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] (peft only divides it)
        target_modules=chosen,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    with _drawn_from(seed):
        inject_adapter_in_model(config, network, adapter_name=ADAPTER)  # freezes the rest
    trainable = [p for p in network.parameters() if p.requires_grad]
    for parameter in trainable:  # peft makes them in the base's dtype
        parameter.data = parameter.data.float()
    return trainable


@contextlib.contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    # peft draws on the CPU, wherever the network lives: one seed gives one A everywhere
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """Refuse no targets, and one (a module name, or the end of its path) that matches nothing."""
    names = module_names(network)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            kinds = sorted({_kind(name) for name in names})
            raise ValueError(
                f"the target {target!r} matches no module of the network; choose from: "
                f"{', '.join(kinds)}"
            )
    if not targets:
        raise ValueError("there are no LoRA targets: name at least one, for example to_q")


def _kind(name: str) -> str:
    """The end of a path that says what a module is: "to_q", "to_out.0"."""
    parts = name.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def module_names(network: nn.Module) -> list[str]:
    """Paths of the modules that can carry an adapter, whether or not they do."""
    names = []
    for name, module in network.named_modules():
        inside = ".base_layer" in name or ".lora_" in name
        if isinstance(module, (nn.Linear, nn.Conv2d, LoraLayer)) and not inside:
            names.append(name)
    return names


def adapters(network: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The adapters of a network with the paths of their modules, in its order."""
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module


def _weights(layer: LoraLayer) -> tuple[Any, Any]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


@contextlib.contextmanager
def reference(network: nn.Module) -> Iterator[None]:
    """Switch the adapters off within it: the network is then the reference policy.

    The trainable parameters are the same afterwards. It may be nested.
    """
    layers = [m for m in network.modules() if isinstance(m, BaseTunerLayer)]
    active = [layer for layer in layers if not layer.disable_adapters]
    trainable = [p for layer in active for p in layer.parameters() if p.requires_grad]
    for layer in active:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for parameter in trainable:
            parameter.requires_grad_(True)


# --- to a file -----------------------------------------------------------------------------------


def export_lora(
    network: nn.Module,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a network's adapters as a LoRA that ComfyUI and diffusers load; SD1.x's A1111 too.

    Args:
        path: the file, *.safetensors; replaced in one step.
        metadata: added to the standard entries, or replacing them (base model, algorithm, step).
        dtype: of the weights. Short runs leave values below float16's normal range.

    Raises:
        ValueError: if the network has no adapters; `NotFiniteError` if one is not finite.
    """
    tensors: dict[str, Tensor] = {}
    spec = spec_of(network)
    ranks: Counter[tuple[int, float]] = Counter()
    for name, layer in adapters(network):
        down, up = _weights(layer)
        rank = down.shape[0]
        alpha = layer.scaling[ADAPTER] * rank
        ranks[rank, alpha] += 1
        parts = (down.detach(), up.detach(), torch.tensor(alpha))
        if spec.is_scale_folded:
            parts = (parts[0], parts[1] * (alpha / rank))
        tensors |= dict(zip(keys.tensor_names(spec, name), parts, strict=False))
    if not tensors:
        raise ValueError("the network has no adapters to export: add_lora comes first")
    (rank, alpha), _ = ranks.most_common(1)[0]
    alpha = float(rank) if spec.is_scale_folded else alpha
    notes = _metadata(spec, rank, alpha) | dict(metadata or {})
    return write_safetensors(stored_in(tensors, dtype), path, notes)


def _metadata(spec: FamilySpec, rank: int, alpha: float) -> dict[str, Any]:
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_base_model_version": spec.lora_base,
        **spec.lora_notes,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": spec.lora_architecture,
    }


def spec_of(network: nn.Module) -> FamilySpec:
    """The family of a network, by its class; the first family for one that is no model's."""
    kinds = (kind.__name__ for kind in type(network).__mro__)
    spec = spec_of_class(kinds, getattr(network, "config", None))
    return spec or next(iter(FAMILIES.values()))


def export_unet(
    network: nn.Module,
    path: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    weights: Mapping[str, Tensor] | None = None,
    marks: Sequence[str] = (),
) -> Path:
    """Write a whole network after full fine-tuning, in diffusers' names, and return the file.

    Args:
        network: without adapters, unwrapped.
        path: a *.safetensors file (for ComfyUI's Load Diffusion Model), or a folder that gets the
            weights and config.json (for diffusers).
        metadata: entries of the file's header.
        weights: replace the network's own, by its names.
        marks: of `InComfyUI.marks`, added to a file. ComfyUI heeds them beside the original names
            alone, which the file then has.

    Raises:
        ValueError: if the network has adapters.
    """
    if any(isinstance(module, BaseTunerLayer) for module in network.modules()):
        raise ValueError("the network has adapters: export them as a LoRA instead")
    path = Path(path)
    if path.suffix != ".safetensors":
        path.mkdir(parents=True, exist_ok=True)
        config: Any = network
        (path / "config.json").write_text(config.to_json_string(), encoding="utf-8")
        path, marks = path / "diffusion_pytorch_model.safetensors", ()
    tensors = network.state_dict() if weights is None else weights
    state = {key: tensor.detach().to(dtype) for key, tensor in tensors.items()}
    if marks:
        state = {original: state[key] for original, key in original_names(state)}
        state |= {mark: torch.zeros(0) for mark in marks}
    return write_safetensors(state, path, {"format": "pt", **(metadata or {})})


# --- from a file ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """The adapters that a LoRA file put on a network.

    Attributes:
        alpha: of the adapters, not of the file.
        targets: paths of the modules that the file changes.
        notes: differences between the file and the run, one sentence each, for the user.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    notes: tuple[str, ...]


def read_lora(
    network: nn.Module, path: Path, *, ignore_text_encoder: bool = False
) -> dict[str, Delta]:
    """Read a LoRA file's changes by module path; `ModelError` if the file does not fit.

    Args:
        network: unwrapped, with adapters or without.
        ignore_text_encoder: skip changes of text encoders, instead of refusing them.
    """
    rows = rows_of(network)
    return keys.read_lora(path, spec_of(network), rows, ignore_text_encoder=ignore_text_encoder)


def rows_of(network: nn.Module) -> dict[str, int]:
    """The length of the output of each module that can carry an adapter, by its path."""
    return {name: _rows(network.get_submodule(name)) for name in module_names(network)}


def _rows(module: Any) -> int:
    """The output length of a linear layer, with adapters or without."""
    return getattr(module, "base_layer", module).weight.shape[0]


def load_lora(
    network: nn.Module, path: str | Path, *, ignore_text_encoder: bool = False
) -> LoadedLora:
    """Start from a LoRA file: the adapters then compute exactly what the file says.

    If the network has adapters, they keep their rank, alpha and targets: a lower rank in the file
    is padded with zeros, another alpha / rank is folded into B, and targets the file does not name
    start at zero. If it has none, they are made with the file's rank, alpha and targets.

    Args:
        network: unwrapped; changed in place.
        path: a plain LoRA in kohya's, diffusers' or peft's names.
        ignore_text_encoder: skip changes of the text encoder, instead of refusing them.

    Raises:
        ModelError: if the file cannot be used on this network or with these adapters.
    """
    deltas = read_lora(network, Path(path), ignore_text_encoder=ignore_text_encoder)
    layers = dict(adapters(network))
    if not layers:
        first = next(iter(deltas.values()))
        rank = max(delta.rank for delta in deltas.values())
        add_lora(network, rank, first.scale * rank, list(deltas))
        layers = dict(adapters(network))
    others = {_kind(name) for name in deltas.keys() - layers.keys()}
    if others:
        every = others | {_kind(name) for name in layers}
        raise ModelError(
            f"the LoRA {Path(path).name} also changes {', '.join(sorted(others))}, which have no "
            f"adapters in this run: set trainable.targets to {', '.join(sorted(every))}"
        )
    for name, layer in layers.items():
        _fill(name, layer, deltas.get(name))
    layer = next(iter(layers.values()))
    rank = layer.r[ADAPTER]
    alpha = layer.scaling[ADAPTER] * rank
    return LoadedLora(rank, alpha, tuple(deltas), _notes(deltas, len(layers), rank, alpha))


@torch.no_grad()
def _fill(name: str, layer: LoraLayer, delta: Delta | None) -> None:
    down, up = _weights(layer)
    up.zero_()
    if delta is None:
        return
    rank = delta.rank
    if rank > down.shape[0]:
        raise ModelError(
            f"the LoRA has rank {rank} and this run {down.shape[0]}: set trainable.rank to {rank}"
        )
    delta.check_fits(name, down[:rank].shape, up[:, :rank].shape)
    scale = delta.scale / layer.scaling[ADAPTER]
    down[:rank] = delta.down.reshape(down[:rank].shape)
    up[:, :rank] = delta.up.reshape(up[:, :rank].shape) * scale


def _notes(deltas: Mapping[str, Delta], num: int, rank: int, alpha: float) -> tuple[str, ...]:
    notes = []
    ranks = sorted({delta.rank for delta in deltas.values()})
    if ranks != [rank]:
        notes.append(f"its rank {ranks} was padded with zeros to this run's rank {rank}")
    scales = sorted({delta.scale for delta in deltas.values()})
    if any(abs(scale - alpha / rank) > 1e-6 for scale in scales):
        notes.append(
            f"its scale alpha / rank {scales} differs from this run's {alpha / rank:g}: the "
            "difference was folded into the weights, so that the images are the same"
        )
    if len(deltas) < num:
        notes.append(f"it changes {len(deltas)} of this run's {num} modules: the others start at 0")
    return tuple(notes)
