"""AdamW with moments in float32 or in 8 bits, and the moments as named tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...config.sections import OptimizerConfig
from ...distributed.sharding import local

PREFIX = "optimizer."


def make_optimizer(config: OptimizerConfig, parameters: Sequence[nn.Parameter]) -> Any:
    """AdamW over parameters.

    In 8 bits each block of 256 moments shares a scale; tensors of less than 4096 stay in float32.
    """
    kind: Any = torch.optim.AdamW
    if config.kind == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        kind = AdamW8bit
    return kind(
        parameters,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        eps=config.eps,
    )


def moments_of(optimizer: Any) -> dict[str, Tensor]:
    """An optimizer's state as tensors that share no memory, named "optimizer.INDEX.NAME"."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in _flat(state).items():
            tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(int(value))
            place = local(tensor).data_ptr()
            if place in seen:  # tables of 8-bit numbers are shared
                tensor = tensor.clone()
            seen.add(place)
            tensors[f"{PREFIX}{index}.{name}"] = tensor
    return tensors


def moments(optimizer: Any) -> Iterator[Tensor]:
    """An optimizer's moments, or their scales in 8 bits, without copies."""
    for state in optimizer.state.values():
        for value in _flat(state).values():
            if isinstance(value, Tensor) and value.ndim:  # else the number of steps
                yield value


def _flat(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the inner table that bitsandbytes keeps its codes in."""
    flat: dict[str, Any] = {}
    for name, value in state.items():
        flat |= value if isinstance(value, Mapping) else {name: value}
    return flat


def load_moments(optimizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Restore an optimizer, in place, from the tensors of `moments_of`.

    It must be of the same kind over the same parameters.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(PREFIX):
            index, kind = name.removeprefix(PREFIX).split(".", 1)
            is_count = tensor.ndim == 0 and not tensor.is_floating_point()
            state.setdefault(int(index), {})[kind] = tensor.item() if is_count else tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
