"""A network of known shapes: built once for all that use it, filled from a file, on a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .find import digest, part_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BUILT: WeakValueDictionary[tuple[Any, ...], nn.Module] = WeakValueDictionary()
_BUILDING = threading.Lock()


def device_of(network: nn.Module) -> torch.device:
    """The network's device, which may be another at the next call."""
    return next(network.parameters()).device


def dtype_of(network: nn.Module) -> torch.dtype:
    return next(network.parameters()).dtype


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Switch off autocast within it, whoever calls."""
    with torch.autocast(device.type, enabled=False):
        yield


def load_frozen(
    path: Path,
    prefixes: Sequence[str],
    made_as: Any,
    make: Callable[[], nn.Module],
    dtype: str,
    stem: str = "",
) -> nn.Module:
    """A frozen network of a file's weights; the one in memory if its weights are the same.

    Args:
        path: the weight file.
        prefixes: of the names that belong to the network.
        made_as: what defines it besides its weights; equal for equal networks.
        make: makes the network, whose weights may be on the meta device.
        dtype: a key of `DTYPES`.
        stem: prefix in the file that the network's own names lack.

    Returns:
        The network, on the CPU unless another user has moved it.
    """
    with _BUILDING:
        place = (digest(path, *prefixes), made_as, dtype)
        network = _BUILT.get(place)
        if network is None:
            state = {n.removeprefix(stem): t for n, t in part_of(path, *prefixes).items()}
            network = build_frozen(make, state, DTYPES[dtype])
            _BUILT[place] = network
        return network


def build_frozen(
    make: Callable[[], nn.Module], state: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """A frozen network with these weights, in evaluation mode.

    Args:
        make: makes the network; its own weights are never allocated.
        state: exactly the weights it has; copied.
        dtype: to compute in.
    """
    with torch.device("meta"):
        network = make()
    copies = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in state.items()}
    network.load_state_dict(copies, strict=True, assign=True)
    for module in network.modules():
        ids = getattr(module, "position_ids", None)
        if isinstance(ids, Tensor):  # not in the file, and counted up from 0
            module.position_ids = torch.arange(ids.shape[-1])[None]
    return network.eval().requires_grad_(False)
