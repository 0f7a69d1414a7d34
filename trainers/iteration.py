"""One iteration: sample, score, compare, update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pcpo import combine_advantages
from ..pcpo.rollout import generator_for
from .build import averaging_decay, learning_rate
from .control import Control
from .prepare import Setup
from .progress import Progress
from .prompts import chosen_prompts
from .sampling import Request
from .sharding import local, whole
from .store import shared
from .update import SUMS, Batch, Pairs, accumulate, check_on_policy, chosen_pairs, summarise


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

    requests, processes = requests_of(setup, iteration), setup.processes
    order = order_of(setup, iteration, len(requests))
    mine = processes.share(order)
    filled = processes.filled(mine, len(requests))
    bar = progress.bar("sampling", len(filled))

    def sampled_so_far(done: int) -> None:
        bar(done)
        if setup.is_sharded:
            processes.decided(control.check)
        else:
            control.check()

    with setup.passes():
        sampled = setup.sampler.under(plan)([requests[i] for i in filled], sampled_so_far)
    with processes.agreed():
        prompts = [setup.prompts[requests[i].prompt] for i in mine]
        own = setup.judges.score(sampled.images[: len(mine)], prompts)
    rewards = processes.gathered(own, order).T
    advantages = advantages_of(setup, rewards, requests)
    rolled_out = time.monotonic()

    place = sampled.trajectory.final.device
    embeds = shared(setup.embeds, [requests[i].prompt for i in filled], place)
    batch = Batch(sampled.trajectory, embeds, advantages[filled].to(device), plan)
    if iteration == 0:
        with setup.passes():
            worst = check_on_policy(setup.objective, batch, config.run.micro_batch)
        progress.say(f"on policy |log ratio| is {processes.largest(worst):.1e}")
    updates = update(setup, batch, requests, order, iteration, progress)
    return _line(setup, iteration, rewards, updates, started, rolled_out)


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


def order_of(setup: Setup, iteration: int, count: int) -> list[int]:
    """The order in which an iteration's images are trained: a function of its number alone."""
    generator = generator_for(setup.config.run.seed, "order", iteration)
    return torch.randperm(count, generator=generator).tolist()


def advantages_of(setup: Setup, rewards: Tensor, requests: Sequence[Request]) -> Tensor:
    """How much better than expected each image is, (b,)."""
    prompts = [setup.prompts[request.prompt] for request in requests]
    judges = setup.judges
    scaled = judges.trained(rewards)
    if setup.config.advantage.combine == "advantages":
        return combine_advantages(setup.advantages, list(scaled), list(judges.weights), prompts)
    return setup.advantages[0](judges.added(scaled), prompts)


def update(
    setup: Setup,
    batch: Batch,
    requests: Sequence[Request],
    order: Sequence[int],
    iteration: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The iteration's optimizer steps, each on its own part of the images.

    Args:
        setup: the run.
        batch: this process's trajectories.
        requests: the images of all processes.
        order: in which they are trained.
        iteration: counted from 0.
        progress: shown what happens.

    Returns:
        The means of each update.
    """
    config, accelerator = setup.config, setup.accelerator
    size, summaries = config.run.micro_batch, []
    for turn, part in enumerate(torch.tensor(order).tensor_split(config.optimizer.updates)):
        shares = _pairs_of(setup, requests, order, part.tolist(), len(batch.trajectory.step))
        chosen, total = shares[setup.processes.rank], sum(map(len, shares))
        longest = -(-max(map(len, shares)) // size) if setup.is_sharded else 0
        sums = torch.zeros(SUMS, device=accelerator.device)
        with setup.passes():
            if chosen or longest:
                pairs = Pairs.of(chosen, size, accelerator.device, longest)
                bar = progress.backward(accelerator.backward, len(pairs.image) // size)
                sums = accumulate(setup.objective, batch, pairs, total, size, bar)
        norm = _step(setup, iteration * config.optimizer.updates + turn)
        summaries.append(summarise(_reduced(setup, sums)) | {"grad_norm": norm})
    return summaries


def _pairs_of(
    setup: Setup, requests: Sequence[Request], order: Sequence[int], part: list[int], steps: int
) -> list[list[tuple[int, int]]]:
    """What each process trains of a part of the images: (row of its trajectories, step) pairs."""
    shares = []
    for rank in range(setup.processes.count):
        row_of = {image: row for row, image in enumerate(setup.processes.share(order, rank))}
        owned = [(row_of[i], requests[i].key) for i in part if i in row_of]
        shares.append(chosen_pairs(owned, steps, setup.selection))
    return shares


def _step(setup: Setup, done: int) -> float:
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


def _reduced(setup: Setup, sums: Tensor) -> list[float]:
    """Sums over all processes; the first entry is a maximum."""
    count = setup.processes.count
    everyone = setup.processes.gathered(sums[None], range(count))
    return [everyone[:, 0].max().item(), *everyone[:, 1:].sum(0).tolist()]


def _line(
    setup: Setup,
    iteration: int,
    rewards: Tensor,
    updates: list[dict[str, Any]],
    started: float,
    rolled_out: float,
) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    total = setup.judges.shown(rewards)
    now = time.monotonic()
    histograms = [u.pop("log_ratio_histogram") for u in updates]
    mean = {k: sum(u[k] for u in updates) / len(updates) for k in updates[0]}
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
        "seconds": now - started,
        "seconds_rollout": rolled_out - started,
        "seconds_update": now - rolled_out,
        "images_per_second": setup.config.images / (now - started),
    }
