"""An update of two passes: everything was sampled before, and is trained on now.

The update sees each latent again. So it may make several steps on one rollout, of which all but the
first are off policy, where ratios and clipping have their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....pcpo import Trajectory
from ...families.embeds import Embeds, SharedEmbeds
from ...memory.trajectory_store import shared
from ..embeds_cache import StoredEmbeds
from ..iteration import Iteration
from .learner import Learner
from .objective import SUMS, Batch, Pairs, accumulate, check_on_policy, chosen_pairs


def update(
    learner: Learner,
    iteration: Iteration,
    mine: Sequence[int],
    trajectory: Trajectory,
    embeds: Embeds | SharedEmbeds | StoredEmbeds,
    advantages: Float[Tensor, " b"],
) -> list[dict[str, Any]]:
    """The iteration's optimizer steps, each on its own part of the images.

    Args:
        learner: the weights.
        iteration: its images.
        mine: those of this process.
        trajectory: of these.
        embeds: of the run's prompts.
        advantages: of all images.

    Returns:
        The means of each update.
    """
    config, processes, size = learner.config, learner.processes, learner.config.run.micro_batch
    prompts = [iteration.requests[i].prompt for i in mine]
    known = advantages[mine].to(processes.device)
    told = shared(embeds, prompts, trajectory.final.device)
    batch = Batch(trajectory, told, known, iteration.plan)
    if iteration.number == 0:
        with processes.passes():
            worst = check_on_policy(learner.objective, batch, size)
        iteration.progress.say(f"on policy |log ratio| is {processes.largest(worst):.1e}")
    means, updates = [], config.optimizer.updates
    for turn, part in enumerate(torch.tensor(iteration.order).tensor_split(updates)):
        shares = _pairs_of(learner, iteration, part.tolist(), len(trajectory.step))
        chosen, total = shares[processes.rank], sum(map(len, shares))
        longest = -(-max(map(len, shares)) // size) if processes.is_sharded else 0
        sums = torch.zeros(SUMS, device=processes.device)
        with processes.passes():
            if chosen or longest:
                pairs = Pairs.of(chosen, size, processes.device, longest)
                backward = processes.accelerator.backward
                bar = iteration.progress.backward(backward, len(pairs.image) // size)
                sums = accumulate(learner.objective, batch, pairs, total, size, bar)
        means.append(learner.step(iteration.number * updates + turn, sums))
    return means


def _pairs_of(
    learner: Learner, iteration: Iteration, part: list[int], steps: int
) -> list[list[tuple[int, int]]]:
    """For a part of the images, each process's (row of its trajectories, step) pairs."""
    shares, processes = [], learner.processes
    for rank in range(processes.count):
        row_of = {image: row for row, image in enumerate(processes.share(iteration.order, rank))}
        owned = [(row_of[i], iteration.requests[i].key) for i in part if i in row_of]
        shares.append(chosen_pairs(owned, steps, learner.selection))
    return shares
