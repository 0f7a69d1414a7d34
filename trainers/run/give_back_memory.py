"""Free the memory of the GPU while a run waits."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .setup import Setup


@contextmanager
def memory_given_back(setup: Setup) -> Iterator[None]:
    """Move the model to main memory within it; on a CPU nothing changes.

    The moments of the optimizer and averages stay on the device: they are small for LoRA.
    """
    if setup.processes.device.type != "cuda" or setup.processes.is_sharded:
        yield
        return
    modules = [m for m in vars(setup.family).values() if isinstance(m, nn.Module)]
    second = setup.measures.second if setup.measures is not None else None
    for reward_set in (setup.reward_set, second):
        modules += (
            [m for reward in reward_set.rewards for m in reward.modules()] if reward_set else []
        )
    with in_main_memory(modules):
        gc.collect()
        torch.cuda.empty_cache()
        yield


@contextmanager
def in_main_memory(modules: list[nn.Module]) -> Iterator[None]:
    """Move the modules to the CPU within it; their parameters stay the same objects."""
    homes = [(m, parameter.device) for m in modules for parameter in [*m.parameters()][:1]]
    for module, _ in homes:
        module.to("cpu")
    try:
        yield
    finally:
        for module, device in homes:
            module.to(device)
