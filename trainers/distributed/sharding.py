"""A network whose weights are split over the processes: torch's `fully_shard`, for full fine-tunes.

Each process holds a part of every weight, with its gradient, its moments and its average; a block's
weights are gathered while it computes. Gradients are summed, not averaged, since the loss is
divided by the pairs of all processes already.

Gathering weights needs every process: all must make the same passes in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.train_config import ConfigError


def shard(network: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Split a network's weights over all processes, block by block, and return the parameters.

    `ConfigError` if torch is too old.

    Args:
        network: on any device; changed in place, and moved to `device` part by part.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        divide = FSDPModule.set_gradient_divide_factor
        add_up = FSDPModule.set_force_sum_reduction_for_comms
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"trainable.shard needs a newer torch than {torch.__version__}; update it, or set "
            "trainable.shard to false"
        ) from error
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    lists = [part for part in network.children() if isinstance(part, nn.ModuleList)]
    for module in [*(block for blocks in lists for block in blocks), network]:
        # also the outermost: else its weights, once brought together, would outlive an update
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            divide(module, 1.0)
            add_up(module, True)
    return list(network.parameters())


def is_split(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`; not imported, for some builds of torch have none."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a split tensor, sharing its memory; a plain tensor as it is."""
    plain: Any = tensor.detach()
    return plain.to_local() if is_split(tensor) else plain


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a split tensor, which needs every process; a plain tensor as it is."""
    plain: Any = tensor.detach()
    return plain.full_tensor() if is_split(tensor) else plain


def split_like(tensor: Tensor, model: Any) -> Tensor:
    """Split a whole tensor as another one is; each process takes its part of its own copy."""
    if not is_split(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(model.device), model.device_mesh, model.placements, src_data_rank=None
    )


class swap_values:
    """Give the parameters other values within it.

    Args:
        values: for the time being, one per parameter; those of split ones are changed within it.
    """

    def __init__(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.pairs = list(zip(parameters, values, strict=True))
        self.kept: list[Tensor] = []

    def __enter__(self) -> None:
        if self._trade_places():
            return
        self.kept = [p.data for p, _ in self.pairs]
        for parameter, value in self.pairs:
            parameter.data = value

    def __exit__(self, *exception: object) -> None:
        if self._trade_places():
            return
        for (parameter, _), value in zip(self.pairs, self.kept, strict=True):
            parameter.data = value

    def _trade_places(self) -> bool:
        """Split parameters are known by their memory, so values trade places in it."""
        if not is_split(self.pairs[0][0]):
            return False
        for parameter, value in self.pairs:
            _exchange(local(parameter), local(value))
        return True


@torch.no_grad()
def _exchange(first: Tensor, second: Tensor) -> None:
    """Exchange the values of two tensors in place."""
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def gather_tensors(tensors: Mapping[str, Any], is_wanted: bool) -> dict[str, Tensor]:
    """Gather whole tensors on the CPU, one after the other; every process must call this.

    The result is empty in a process that does not want them.
    """
    tensors_here = {}
    for name, tensor in tensors.items():
        everything = full_tensor(tensor)
        if is_wanted:
            tensors_here[name] = everything.cpu().contiguous()
    return tensors_here
