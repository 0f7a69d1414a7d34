"""What both ways to learn from an iteration share: advantages, the optimizer's step, the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....pcpo import Plan, combine_advantages
from ....pcpo.finite import all_finite
from ...config.train_config import TrainConfig
from ...distributed.sharding import local, whole
from ...errors import RunError
from ...job.files import finite
from ...report.progress import Progress
from ..control import Control
from ..method import averaging_decay, learning_rate
from ..sampler import Request
from ..setup import Setup
from .objective import summarise
from .optimizers import moments

WORDS = {"grad_norm": "the norm of the gradient", "log_ratio": "log rho", "loss": "the loss"}
"""Names of an update's means in an error."""


class Diverged(RunError):
    """Training gave numbers that are not finite; nothing of them was saved."""


@dataclass(frozen=True, slots=True)
class Task:
    """One iteration's work.

    Attributes:
        iteration: counted from 0.
        plan: its sampler, on the device.
        requests: its images, over all processes.
        progress: shows what happens.
        control: may stop it while it samples.
    """

    iteration: int
    plan: Plan
    requests: Sequence[Request]
    progress: Progress
    control: Control


@dataclass(frozen=True, slots=True)
class Learnt:
    """The results of an iteration.

    Attributes:
        rewards: of each image, in the order of the requests.
        advantages: likewise.
        updates: the means of each update.
        seconds_update: of everything after the rewards.
    """

    rewards: Float[Tensor, "rewards b"]
    advantages: Float[Tensor, " b"]
    updates: list[dict[str, Any]]
    seconds_update: float


def sampled_so_far(setup: Setup, task: Task, total: int) -> Callable[[int], None]:
    """A callback for the number of images done: draws a bar, and stops the run if asked to.

    `total` is the number of this process's images.
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
    """How much better than expected each image is; `Diverged` if a float cannot hold it."""
    prompts = [setup.prompts[request.prompt] for request in requests]
    judges = setup.judges
    scaled = judges.trained(rewards)
    if setup.config.advantage.combine == "advantages":
        weights = list(judges.weights)
        advantages = combine_advantages(setup.advantages, list(scaled), weights, prompts)
    else:
        advantages = setup.advantages[0](judges.added(scaled), prompts)
    if not all_finite([advantages]):
        raise Diverged(
            "the advantages are not finite: the rewards, times their weights and scales, are too "
            "large; lower rewards.NAME.weight or .scale, or set normalise to 'z_score'"
        )
    return advantages


def step(setup: Setup, done: int, sums: Tensor) -> dict[str, Any]:
    """One optimizer step on the gradients of all processes, unless training has diverged.

    Args:
        setup: the run.
        done: updates before this one.
        sums: this process's, as `Objective.loss` describes them.

    Returns:
        The means of the update, with the gradient's norm before clipping; that is None if float16's
        scaled gradients overflow, and the step is skipped.
    """
    for group in setup.optimizer.param_groups:
        group["lr"] = learning_rate(setup.config.optimizer, done)
    for parameter in setup.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not setup.is_sharded:  # else they were summed on their way
        setup.processes.add_up([p.grad for p in setup.parameters if p.grad is not None])
    limit = setup.config.optimizer.max_grad_norm
    norm: Any = setup.accelerator.clip_grad_norm_(setup.parameters, limit)
    means = summarise(reduced(setup, sums)) | {"grad_norm": float(whole(norm))}
    with setup.processes.agreed():
        _check_means(setup, done, means)
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    decay = averaging_decay(setup.config.trainable, done)
    if setup.averaged is not None and decay is not None:
        setup.averaged.add(setup.parameters, decay)
    with setup.processes.agreed():
        _check_weights(setup, done)
    return finite(means)


def _check_means(setup: Setup, done: int, means: dict[str, Any]) -> None:
    """Refuse a step whose means are not finite, naming the first."""
    scaler = setup.accelerator.scaler
    for name, value in means.items():
        if name == "log_ratio_histogram" or isfinite(value):
            continue
        if name == "grad_norm" and scaler is not None and scaler.get_scale() > 1:
            continue  # it leaves the step out, and scales less from now on
        raise Diverged(_why(setup.config, done, f"{WORDS.get(name, name)} is {value}"))


def _check_weights(setup: Setup, done: int) -> None:
    """Refuse weights that are not finite after the step: a finite gradient may still cause them."""
    parts = {
        "weights": setup.parameters,
        "averaged weights": setup.averaged.weights if setup.averaged else (),
        "moments of the optimizer": moments(setup.optimizer),
    }
    for name, tensors in parts.items():
        if not all_finite(map(local, tensors)):
            why = f"not all {name} are finite after the step"
            raise Diverged(_why(setup.config, done, why))


def _why(config: TrainConfig, done: int, what: str) -> str:
    """The message of a run that cannot go on: where, what and the remedy."""
    iteration, update = divmod(done, config.optimizer.updates)
    kept = f"what was saved up to iteration {iteration} is good" if iteration else "nothing is lost"
    return (
        f"training diverged in iteration {iteration + 1}, update {update + 1} of "
        f"{config.optimizer.updates}: {what}; {kept}; start a new run with a lower optimizer.lr "
        f"({config.optimizer.lr:g})"
    )


def reduced(setup: Setup, sums: Tensor) -> list[float]:
    """Sums over all processes; the first entry is a maximum."""
    count = setup.processes.count
    everyone = setup.processes.gathered(sums[None], range(count))
    return [everyone[:, 0].max().item(), *everyone[:, 1:].sum(0).tolist()]
