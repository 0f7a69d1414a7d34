"""`model.compile`: torch compiles the network's transformer blocks, each kind once.

Compiled kernels add in another order than torch's own, so predictions differ in their last digits
from those of a run that is not compiled. Rollout and update must still agree: the on-policy check
of the first iteration measures that, as for every run.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from ..config.train_config import ConfigError
from ..families.registry import FAMILIES


def check_compiler(device: torch.device) -> None:
    """Refuse to compile without a compiler, naming what is missing."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "model.compile is true, but triton is missing, which compiles for a GPU; install "
                "it (on Windows: triton-windows), or set model.compile to false"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise ConfigError(
            "model.compile is true, but there is no C++ compiler, which compiles for a CPU; "
            "install one (g++, clang++ or cl), or set model.compile to false"
        ) from error


def compile_blocks(network: nn.Module) -> int:
    """Have a network's repeated blocks compiled at their first call, and count them.

    The adapters must be in place already. Parameters keep their names. Each shape is compiled
    separately, and so are passes with and without gradients.
    """
    repeated = {name for spec in FAMILIES.values() for name in spec.blocks}
    blocks = [module for module in network.modules() if type(module).__name__ in repeated]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
