"""One iteration: sample, score, compare, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..pcpo import combine_advantages
from ..pcpo.rollout import generator_for
from .build import averaging_decay, learning_rate
from .config import TrainConfig
from .control import Control, RunError
from .prepare import Setup
from .progress import Progress
from .prompts import chosen_prompts
from .sampling import Request, Sampled
from .store import shared
from .update import SUMS, Batch, Pairs, accumulate, check_on_policy, chosen_pairs, summarise


class RewardError(RunError):
    """A reward failed; nothing was learnt from the iteration."""


def one_iteration(
    setup: Setup, iteration: int, progress: Progress, control: Control
) -> dict[str, Any]:
    """Sample, score, compare, update.

    Args:
        setup: the run.
        iteration: counted from 0.
        progress: shown what happens.
        control: may stop it while it samples.

    Returns:
        Its line of metrics.jsonl.
    """
    config, device = setup.config, setup.accelerator.device
    started = time.monotonic()
    plan = setup.plans.at(iteration, setup.selection).to(device)

    requests = requests_of(setup, iteration)
    mine = _share(requests, setup)
    bar = progress.bar("sampling", len(mine))

    def sampled_so_far(done: int) -> None:
        bar(done)
        control.check()

    sampled = setup.sampler.under(plan)([requests[i] for i in mine], sampled_so_far)
    rewards = score(setup, sampled, [setup.prompts[requests[i].prompt] for i in mine])
    advantages = advantages_of(setup, rewards, requests)
    rolled_out = time.monotonic()

    place = sampled.trajectory.final.device
    embeds = shared(setup.embeds, [requests[i].prompt for i in mine], place)
    batch = Batch(sampled.trajectory, embeds, advantages[mine].to(device), plan)
    if iteration == 0:
        worst = check_on_policy(setup.objective, batch, config.run.micro_batch)
        progress.say(f"on policy |log ratio| is {worst:.1e}")
    updates = update(setup, batch, requests, mine, iteration, progress)
    return _line(iteration, rewards, config, updates, started, rolled_out)


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


def _share(requests: Sequence[Request], setup: Setup) -> list[int]:
    """This process's images."""
    world, rank = setup.accelerator.num_processes, setup.accelerator.process_index
    return list(range(len(requests)))[
        rank * len(requests) // world : (rank + 1) * len(requests) // world
    ]


def score(setup: Setup, sampled: Sampled, prompts: list[str]) -> Tensor:
    """Rewards of all processes' images, (rewards, b), in the order of the requests.

    Raises:
        RewardError: where one of them is missing or not a number.
    """
    found = []
    for reward in setup.rewards:
        try:
            scores = reward.score(sampled.images, prompts)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise RewardError(f"the reward {reward.name!r} failed: {text}") from error
        if not scores.values.isfinite().all():
            why = next((error for error in scores.errors if error), "it is not a number")
            raise RewardError(f"the reward {reward.name!r} failed: {why}")
        found.append(scores.values.float())
    columns = torch.stack(found, dim=1).tolist()
    return torch.tensor(gather_object(columns)).T


def advantages_of(setup: Setup, rewards: Tensor, requests: Sequence[Request]) -> Tensor:
    """How much better than expected each image is, (b,)."""
    prompts = [setup.prompts[request.prompt] for request in requests]
    weights = list(setup.config.rewards.values())
    if setup.config.advantage.combine == "advantages":
        return combine_advantages(setup.advantages, list(rewards), weights, prompts)
    total = (torch.tensor(weights)[:, None] * rewards).sum(dim=0)
    return setup.advantages[0](total, prompts)


def update(
    setup: Setup,
    batch: Batch,
    requests: Sequence[Request],
    mine: Sequence[int],
    iteration: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The iteration's optimizer steps, each on its own part of the images.

    Args:
        setup: the run.
        batch: this process's trajectories.
        requests: the images of all processes.
        mine: which of them this process has.
        iteration: counted from 0.
        progress: shown what happens.

    Returns:
        The means of each update.
    """
    config, accelerator = setup.config, setup.accelerator
    generator = generator_for(config.run.seed, "order", iteration)
    order = torch.randperm(len(requests), generator=generator)
    steps, size, summaries = len(batch.trajectory.step), config.run.micro_batch, []
    row_of = {image: row for row, image in enumerate(mine)}
    for turn, part in enumerate(order.tensor_split(config.optimizer.updates)):
        owned = [(row_of[i], requests[i].key) for i in part.tolist() if i in row_of]
        chosen = chosen_pairs(owned, steps, setup.selection)
        images = [(0, requests[i].key) for i in part.tolist()]
        total = len(chosen_pairs(images, steps, setup.selection))
        sums = torch.zeros(SUMS, device=accelerator.device)
        if chosen:
            pairs = Pairs.of(chosen, size, accelerator.device)
            bar = progress.backward(accelerator.backward, len(pairs.image) // size)
            sums = accumulate(setup.objective, batch, pairs, total, size, bar)
        norm = _step(setup, iteration * config.optimizer.updates + turn)
        summaries.append(summarise(_reduced(setup, sums)) | {"grad_norm": norm})
    return summaries


def _step(setup: Setup, done: int) -> float:
    """One optimizer step on the gradients of all processes; their norm before clipping."""
    for group in setup.optimizer.param_groups:
        group["lr"] = learning_rate(setup.config.optimizer, done)
    for parameter in setup.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = setup.accelerator.reduce(parameter.grad, "sum")  # pyright: ignore
    limit = setup.config.optimizer.max_grad_norm
    norm: Any = setup.accelerator.clip_grad_norm_(setup.parameters, limit)
    setup.optimizer.step()
    setup.optimizer.zero_grad()
    decay = averaging_decay(setup.config.trainable, done)
    if setup.averaged is not None and decay is not None:
        now = [parameter.detach() for parameter in setup.parameters]
        torch._foreach_lerp_(setup.averaged, now, 1 - decay)
    return float(norm)


def _reduced(setup: Setup, sums: Tensor) -> list[float]:
    """Sums over all processes; the first entry is a maximum."""
    if setup.accelerator.num_processes == 1:
        return sums.tolist()
    everyone: Any = setup.accelerator.gather(sums[None])
    return [everyone[:, 0].max().item(), *everyone[:, 1:].sum(0).tolist()]


def _line(
    iteration: int,
    rewards: Tensor,
    config: TrainConfig,
    updates: list[dict[str, Any]],
    started: float,
    rolled_out: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    total = (torch.tensor(list(config.rewards.values()))[:, None] * rewards).sum(dim=0)
    now = time.monotonic()
    histograms = [u.pop("log_ratio_histogram") for u in updates]
    mean = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
    parts = {f"reward_{n}": r.mean().item() for n, r in zip(config.rewards, rewards, strict=True)}
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
        "seconds": now - started,
        "seconds_rollout": rolled_out - started,
        "seconds_update": now - rolled_out,
        "images_per_second": config.images / (now - started),
    }
