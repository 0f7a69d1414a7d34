"""One iteration: sample, score, compare, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..job.prompts import chosen_prompts
from ..report.progress import Progress
from .control import Control
from .sampler import Request
from .setup import Setup
from .update.one_pass import one_pass
from .update.optimizer_step import Learnt, Task
from .update.two_pass import two_pass

WAYS = {"one_pass": one_pass, "two_pass": two_pass}


def one_iteration(
    setup: Setup, iteration: int, progress: Progress, control: Control
) -> dict[str, Any]:
    """Run iteration `iteration`, counted from 0, and return its line of metrics.jsonl.

    `control` may stop it while it samples.
    """
    started = time.monotonic()
    plan = setup.plans.at(iteration, setup.selection).to(setup.accelerator.device)
    task = Task(iteration, plan, requests_of(setup, iteration), progress, control)
    return _line(setup, iteration, WAYS[setup.config.method.update](setup, task), started)


def requests_of(setup: Setup, iteration: int) -> list[Request]:
    """The images of an iteration, over all processes: a function of its number alone."""
    config = setup.config
    seed, shared = config.run.seed, config.sampler.initial_noise
    chosen = chosen_prompts(config.prompts, len(setup.prompts), seed, iteration)
    requests = []
    for slot, prompt in enumerate(chosen):
        initial = {"image": None, "prompt": (seed, iteration, slot), "batch": (seed, iteration)}
        for image in range(config.prompts.images_per_prompt):
            key = (seed, iteration, slot, image)
            requests.append(Request(prompt, key, initial[shared]))
    return requests


def _line(setup: Setup, iteration: int, learnt: Learnt, started: float) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    rewards, updates = learnt.rewards, learnt.updates
    total = setup.judges.shown(rewards)
    now = time.monotonic()
    histograms = [u.pop("log_ratio_histogram") for u in updates]
    mean = {name: _mean([update[name] for update in updates]) for name in updates[0]}
    named = zip(setup.judges.labels, rewards, strict=True)
    parts = {f"reward_{label}": values.mean().item() for label, values in named}
    return {
        "iteration": iteration + 1,
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
        **_spread(setup, iteration, learnt),
        "seconds": now - started,
        "seconds_rollout": now - started - learnt.seconds_update,
        "seconds_update": learnt.seconds_update,
        "images_per_second": setup.config.images / (now - started),
    }


def _spread(setup: Setup, iteration: int, learnt: Learnt) -> dict[str, float]:
    """The shares of groups and of images whose rewards give nothing to learn from."""
    prompts = [setup.prompts[request.prompt] for request in requests_of(setup, iteration)]
    groups = equal_groups(learnt.rewards, prompts)
    zero = (learnt.advantages == 0).float().mean().item()
    known = {} if groups is None else {"frac_reward_zero_std": groups}
    return known | {"frac_advantage_zero": zero}


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
