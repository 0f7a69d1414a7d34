"""A reward's networks on the device that ComfyUI draws with, for as long as they score."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from ...pcpo.rewards import Reward
from ...pcpo.rewards.base import on_device


def lend(reward: Reward) -> AbstractContextManager[None]:
    """What a reward scores within.

    Where ComfyUI draws on a device of its own, memory is made free there, and the networks are on
    it until the context ends; then they wait in main memory. On a CPU nothing is moved.

    Args:
        reward: whose networks are loaded now, if they are not yet.
    """
    from comfy.model_management import free_memory, get_torch_device, minimum_inference_memory

    device = get_torch_device()
    if device.type == "cpu":
        return nullcontext()
    modules = reward.modules()
    held = dict.fromkeys(t for m in modules for t in (*m.parameters(), *m.buffers()))
    if not held:
        return nullcontext()
    size = sum(tensor.numel() * tensor.element_size() for tensor in held)
    free_memory(size + minimum_inference_memory(), device)
    return on_device(modules, device)
