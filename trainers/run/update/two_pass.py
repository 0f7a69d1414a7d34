"""An iteration in two passes: sample everything, then train on the samples.

The update sees each latent again. So it may make several steps on one rollout, of which all but the
first are off policy, where ratios and clipping have their place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from ....pcpo.rollout import generator_for
from ...finite import during
from ...memory.trajectory_store import shared
from ...report.progress import Progress
from ..sampler import Request
from ..scoring import Scoring
from ..setup import Setup
from .objective import SUMS, Batch, Pairs, accumulate, check_on_policy, chosen_pairs
from .optimizer_step import Learnt, Task, advantages_of, sampled_so_far, step


def two_pass(setup: Setup, task: Task) -> Learnt:
    """Sample, score, compare, update."""
    requests, processes = task.requests, setup.processes
    order = order_of(setup, task.iteration, len(requests))
    filled = processes.filled(processes.share(order), len(requests))
    tell, scoring = sampled_so_far(setup, task, len(filled)), Scoring(setup, requests, order)
    with setup.passes(), during(f"iteration {task.iteration + 1}"):
        sampled = setup.sampler.under(task.plan)([requests[i] for i in filled], tell, scoring.see)
    rewards = scoring.rewards()
    advantages = advantages_of(setup, rewards, requests)
    rolled_out = time.monotonic()

    place = sampled.trajectory.final.device
    embeds = shared(setup.embeds, [requests[i].prompt for i in filled], place)
    known = advantages[filled].to(setup.accelerator.device)
    batch = Batch(sampled.trajectory, embeds, known, task.plan)
    if task.iteration == 0:
        with setup.passes():
            worst = check_on_policy(setup.objective, batch, setup.config.run.micro_batch)
        task.progress.say(f"on policy |log ratio| is {processes.largest(worst):.1e}")
    updates = update(setup, batch, requests, order, task.iteration, task.progress)
    return Learnt(rewards, advantages, updates, time.monotonic() - rolled_out)


def order_of(setup: Setup, iteration: int, count: int) -> list[int]:
    """The order in which an iteration's images are trained: a function of its number alone."""
    generator = generator_for(setup.config.run.seed, "order", iteration)
    return torch.randperm(count, generator=generator).tolist()


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
        progress: shows what happens.

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
        summaries.append(step(setup, iteration * config.optimizer.updates + turn, sums))
    return summaries


def _pairs_of(
    setup: Setup, requests: Sequence[Request], order: Sequence[int], part: list[int], steps: int
) -> list[list[tuple[int, int]]]:
    """For a part of the images, each process's (row of its trajectories, step) pairs."""
    shares = []
    for rank in range(setup.processes.count):
        row_of = {image: row for row, image in enumerate(setup.processes.share(order, rank))}
        owned = [(row_of[i], requests[i].key) for i in part if i in row_of]
        shares.append(chosen_pairs(owned, steps, setup.selection))
    return shares
