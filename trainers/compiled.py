"""`model.compile`: the network's transformer blocks compiled by torch, each kind once.

Compiled kernels add in another order than torch's own, so predictions differ in their last digits
from those of a run that is not compiled. Rollout and update must still see the same: the on-policy
check of the first iteration measures that, as it does for every run.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from .config import ConfigError

BLOCKS = (
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)
"""Classes of diffusers that a network repeats: of SD1.x, SD3, and FLUX."""


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where there is nothing to compile with.

    Args:
        device: that trains.

    Raises:
        ConfigError: naming what is missing.
    """
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
    """Let a network's repeated blocks be compiled when they are first called.

    Names of parameters stay. Every shape is compiled by itself, and so are passes with and without
    gradients.

    Args:
        network: its adapters are on it; changed in place.

    Returns:
        How many blocks there are.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in BLOCKS]
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)
