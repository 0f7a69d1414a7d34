"""What both ways to learn from an iteration share: advantages, the optimizer's step, the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..pcpo import Plan, combine_advantages
from .build import averaging_decay, learning_rate
from .control import Control
from .prepare import Setup
from .progress import Progress
from .sampling import Request
from .sharding import local, whole


@dataclass(frozen=True, slots=True)
class Task:
    """One iteration's work.

    Attributes:
        iteration: counted from 0.
        plan: its sampler, on the device.
        requests: its images, over all processes.
        progress: shown what happens.
        control: may stop it while it samples.
    """

    iteration: int
    plan: Plan
    requests: Sequence[Request]
    progress: Progress
    control: Control


@dataclass(frozen=True, slots=True)
class Learnt:
    """What an iteration came to.

    Attributes:
        rewards: of each image, in the order of the requests.
        updates: the means of each update.
        seconds_update: of what followed the rewards.
    """

    rewards: Float[Tensor, "rewards b"]
    updates: list[dict[str, Any]]
    seconds_update: float


def sampled_so_far(setup: Setup, task: Task, total: int) -> Callable[[int], None]:
    """What to tell how many images are done: draws a bar, and stops the run where that is asked.

    Args:
        setup: the run.
        task: the iteration.
        total: images of this process.

    Returns:
        To be called with a number of images.
    """
    bar = task.progress.bar("sampling", total)

    def tell(done: int) -> None:
        bar(done)
        if setup.is_sharded:
            setup.processes.decided(task.control.check)
        else:
            task.control.check()

    return tell


def advantages_of(
    setup: Setup, rewards: Float[Tensor, "rewards b"], requests: Sequence[Request]
) -> Float[Tensor, " b"]:
    """How much better than expected each image is."""
    prompts = [setup.prompts[request.prompt] for request in requests]
    judges = setup.judges
    scaled = judges.trained(rewards)
    if setup.config.advantage.combine == "advantages":
        return combine_advantages(setup.advantages, list(scaled), list(judges.weights), prompts)
    return setup.advantages[0](judges.added(scaled), prompts)


def step(setup: Setup, done: int) -> float:
    """One optimizer step on the gradients of all processes; their norm before clipping."""
    for group in setup.optimizer.param_groups:
        group["lr"] = learning_rate(setup.config.optimizer, done)
    for parameter in setup.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not setup.is_sharded:  # else they were summed on their way
        setup.processes.add_up([p.grad for p in setup.parameters if p.grad is not None])
    limit = setup.config.optimizer.max_grad_norm
    norm: Any = setup.accelerator.clip_grad_norm_(setup.parameters, limit)
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    decay = averaging_decay(setup.config.trainable, done)
    if setup.averaged is not None and decay is not None:
        now = [local(parameter) for parameter in setup.parameters]
        torch._foreach_lerp_([local(mean) for mean in setup.averaged], now, 1 - decay)
    return float(whole(norm))


def reduced(setup: Setup, sums: Tensor) -> list[float]:
    """Sums over all processes; the first entry is a maximum."""
    count = setup.processes.count
    everyone = setup.processes.gathered(sums[None], range(count))
    return [everyone[:, 0].max().item(), *everyone[:, 1:].sum(0).tolist()]
