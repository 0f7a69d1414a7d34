"""One iteration: the images that it samples, and its line of metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...pcpo import Plan
from ...pcpo.branches import UNBRANCHED, Branches
from ...pcpo.rollout import generator_for
from ..config.train_config import TrainConfig
from ..job.prompts import chosen_prompts
from ..report.progress import Progress
from .control import Control
from .rewards import RewardSet
from .sampler import Request


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration's work.

    Attributes:
        number: counted from 0.
        plan: its sampler, on the device.
        requests: its images, over all processes.
        order: in which two passes train the images, and deal them out to the processes.
        control: may stop it while it samples.
        started: when it began, in seconds.
    """

    number: int
    plan: Plan
    requests: list[Request]
    prompts: list[str]
    order: list[int]
    progress: Progress
    control: Control
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls,
        number: int,
        plan: Plan,
        config: TrainConfig,
        prompts: Sequence[str],
        progress: Progress,
        control: Control,
    ) -> Iteration:
        """An iteration on some of the prompts to train with, which follow from its number alone."""
        requests = requests_of(config, len(prompts), number, plan.branches)
        texts = [prompts[request.prompt] for request in requests]
        order = order_of(config, number, plan.branches.leaves[0])
        return cls(number, plan, requests, texts, order, progress, control)

    @property
    def tree(self) -> int:
        """Images of a tree, which stay together in one process and one update."""
        return self.plan.branches.leaves[0]

    def sampling(
        self, total: int, *, in_step: bool, changes: bool = False
    ) -> Callable[[int], None]:
        """A callback for the number of images done: draws a bar, and stops the run if asked to.

        Args:
            in_step: whether the processes must stop at the same image.
            changes: whether weights may change before all images are done.
        """
        bar, control = self.progress.bar("sampling", total), self.control

        def advance(done: int) -> None:
            bar(done)
            if in_step:
                control.decide(control.check)
            else:
                control.check()
            control.stop_now(self.number if changes else None)

        return advance

    def backward(self, backward: Callable[[Any], None], total: int) -> Callable[[Any], None]:
        """The same function, to be called `total` times; stops the run if it is to stop now."""
        counted = self.progress.backward(backward, total)

        def checked(loss: Any) -> None:
            self.control.stop_now(self.number)
            counted(loss)

        return checked


@dataclass(frozen=True, slots=True)
class Results:
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


def requests_of(
    config: TrainConfig, prompts: int, iteration: int, branches: Branches = UNBRANCHED
) -> list[Request]:
    """The images of an iteration, over all processes, of so many prompts to train with.

    The images of a tree follow each other.
    """
    seed, shared = config.run.seed, config.sampler.initial_noise
    requests = []
    for slot, prompt in enumerate(chosen_prompts(config.prompts, prompts, seed, iteration)):
        initial = {"image": None, "prompt": (seed, iteration, slot), "batch": (seed, iteration)}
        for image in range(config.prompts.images_per_prompt):
            key = (seed, iteration, slot, *branches.path(image))
            requests.append(Request(prompt, key, initial[shared]))
    return requests


def order_of(config: TrainConfig, iteration: int, tree: int = 1) -> list[int]:
    """A shuffled order of an iteration's images; those of a tree stay together."""
    generator = generator_for(config.run.seed, "order", iteration)
    trees = torch.randperm(config.images // tree, generator=generator)
    return (trees[:, None] * tree + torch.arange(tree)).flatten().tolist()


def line_of(iteration: Iteration, results: Results, reward_set: RewardSet) -> dict[str, Any]:
    """An iteration's line of metrics.jsonl."""
    rewards, updates = results.rewards, results.updates
    total, seconds = reward_set.scale_for_display(rewards), time.monotonic() - iteration.started
    histograms = [u.pop("log_ratio_histogram") for u in updates]
    mean = {name: _mean([update[name] for update in updates]) for name in updates[0]}
    named = zip(reward_set.labels, rewards, strict=True)
    parts = {f"reward_{label}": values.mean().item() for label, values in named}
    equal = equal_groups(rewards, iteration.prompts)
    return {
        "iteration": iteration.number + 1,
        "reward": total.mean().item(),
        "reward_std": total.std(correction=0).item(),
        "reward_min": total.min().item(),
        "reward_max": total.max().item(),
        **parts,
        **mean,
        "log_ratio_max": max(u["log_ratio_max"] for u in updates),
        "clip_fraction_on_policy": updates[0]["clip_fraction"],
        "outside_fraction_on_policy": updates[0]["outside_fraction"],
        "log_ratio_max_on_policy": updates[0]["log_ratio_max"],
        "log_ratio_histogram": [sum(counts) for counts in zip(*histograms, strict=True)],
        "grad_norms": [u["grad_norm"] for u in updates],
        **({} if equal is None else {"frac_reward_zero_std": equal}),
        "frac_advantage_zero": (results.advantages == 0).float().mean().item(),
        "seconds": seconds,
        "seconds_rollout": seconds - results.seconds_update,
        "seconds_update": results.seconds_update,
        "images_per_second": len(iteration.requests) / seconds,
    }


def equal_groups(rewards: Float[Tensor, "rewards b"], prompts: Sequence[str]) -> float | None:
    """The share of prompts, of those with two or more images, whose images have equal rewards.

    None if no prompt has two images.
    """
    groups: dict[str, list[int]] = {}
    for image, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(image)
    parts = [rewards[:, images] for images in groups.values() if len(images) > 1]
    equal = [bool((part == part[:, :1]).all()) for part in parts]
    return sum(equal) / len(equal) if equal else None


def _mean(values: list[float | None]) -> float | None:
    """The mean of the known values: a step that float16 skips has no gradient norm."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
