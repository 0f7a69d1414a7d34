"""Make modules from tensors without a second copy of them, and without random weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import ModelError

_M = TypeVar("_M", bound=nn.Module)


def assemble(make: Callable[[], _M], tensors: Mapping[str, Tensor], what: str) -> _M:
    """A frozen module in eval mode whose parameters are the given tensors, one for one.

    Args:
        make: makes the module; called with torch's "meta" device as the default, so that it
            allocates nothing. Buffers that are not in the module's state stay there.
        tensors: by the names of the module's state; not copied.
        what: the part and its file, for messages ("the network in model.safetensors").

    Raises:
        ModelError: if a tensor is missing, surplus or of another shape.
    """
    with torch.device("meta"):
        module = make()
    expected = module.state_dict()
    for difference, text in (
        (expected.keys() - tensors.keys(), "lacks {}"),
        (tensors.keys() - expected.keys(), "has a tensor {} that does not belong to it"),
    ):
        if difference:
            told = text.format(sorted(difference)[0])
            raise ModelError(f"{what} {told}: the file is incomplete or of another architecture")
    for key, tensor in tensors.items():
        if tensor.shape != expected[key].shape:
            raise ModelError(
                f"{what} has {key} of shape {tuple(tensor.shape)} where "
                f"{tuple(expected[key].shape)} is expected: it is of another architecture"
            )
    module.load_state_dict(tensors, assign=True)
    return module.requires_grad_(False).eval()


def number_of_blocks(modules: Iterable[str]) -> int:
    """The number of a transformer's blocks of the kind that there are most of.

    >>> number_of_blocks(["transformer_blocks.4.attn.to_q", "single_transformer_blocks.9.proj_out"])
    10
    """
    return count_blocks(modules, "(?:single_)?transformer_blocks")


def count_blocks(names: Iterable[str], folder: str) -> int:
    """The number of a network's blocks in a folder (a pattern), by the names of what they hold.

    >>> count_blocks(["layers.0.norm.weight", "layers.3.norm.weight", "other.9.norm"], "layers")
    4
    """
    pattern = re.compile(rf"{folder}\.(\d+)\.")
    return max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1) + 1


def swap_halves(tensor: Tensor) -> Tensor:
    """Swap the first and second half of the rows.

    >>> swap_halves(torch.arange(4))
    tensor([2, 3, 0, 1])
    """
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
