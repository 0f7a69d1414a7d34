"""An update of two passes: everything was sampled before, and is trained on now.

The update sees each latent again. So it may make several steps on one rollout, of which all but the
first are off policy, where ratios and clipping have their place.

Trajectories are flattened into (image, step) micro-batches. The inner loop never waits for the
device: coefficients are gathered by integer rows, metrics are summed on the device and read once
per update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ....pcpo import KLS, RATIOS, Plan, Trajectory
from ....pcpo.plan import Segment
from ....pcpo.rollout import generator_for
from ...config.sections import MethodConfig
from ...errors import UserError
from ...families.embeds import Embeds, SharedEmbeds
from ...finite import NotFiniteError
from ...memory.trajectory_store import copy_to_device, share_embeds
from ..iteration import Iteration
from ..phases import LOSS, phase
from ..sampler import Policy, Sampled, Sampler
from .learner import SUMS, Learner, histogram


class OnPolicyError(UserError, RuntimeError):
    """The update does not reproduce the rollout's predictions, so every ratio would be wrong."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The training data of an iteration, or of one segment of its trees.

    Attributes:
        trajectory: of this process's images; on the device or in main memory.
        embeds: of each image's prompt; likewise.
        advantages: of each image, on the device.
        plan: the sampler they came from, on the device.
        leaves: images that share each of these, and for which it counts.
    """

    trajectory: Trajectory
    embeds: Embeds | SharedEmbeds
    advantages: Float[Tensor, " b"]
    plan: Plan
    leaves: int = 1


def batches_of(
    iteration: Iteration,
    mine: Sequence[int],
    sampled: Sampled,
    sampler: Sampler,
    advantages: Sequence[Float[Tensor, " paths"]],
) -> list[Batch]:
    """The data of an iteration, of each segment.

    Args:
        iteration: its images.
        mine: those of this process.
        sampled: these.
        sampler: that sampled them, with the run's prompts.
        advantages: of all paths, of each segment.
    """
    plan, requests = iteration.plan, [iteration.requests[i] for i in mine]
    prompts, sizes = [request.prompt for request in requests], sampler.sizes(requests)
    place = sampled.trajectories[-1].final.device
    of_each = share_embeds(sampler.embeds, prompts, place, sizes)
    parts = zip(plan.segments, sampled.trajectories, advantages, strict=True)
    batches = []
    for segment, trajectory, values in parts:
        first = [image // segment.leaves for image in mine[:: segment.leaves]]
        embeds, own = of_each.every(segment.leaves), values[first].to(plan.weight.device)
        batches.append(Batch(trajectory, embeds, own, segment.plan, segment.leaves))
    return batches


@dataclass(frozen=True, slots=True)
class Pairs:
    """(image, kept step) pairs, padded to whole micro-batches.

    Attributes:
        host: row and column again, on the CPU.
    """

    image: Int[Tensor, " m"]
    step: Int[Tensor, " m"]
    real: Bool[Tensor, " m"]
    host: Int[Tensor, "m 2"]

    @classmethod
    def of(
        cls,
        chosen: Sequence[tuple[int, int]],
        micro_batch: int,
        device: torch.device,
        batches: int = 0,
    ) -> Pairs:
        """Put pairs on a device, the last one repeated until the last micro-batch is full.

        Args:
            chosen: (image, kept step) pairs.
            batches: smallest number of micro-batches, for processes that must work in step.
        """
        missing = max(batches * micro_batch - len(chosen), -len(chosen) % micro_batch)
        rows = torch.tensor([*chosen, *[chosen[-1] if chosen else (0, 0)] * missing])
        real = torch.arange(len(rows)) < len(chosen)
        return cls(rows[:, 0].to(device), rows[:, 1].to(device), real.to(device), rows)

    def split(self, size: int) -> list[Pairs]:
        columns = (self.image, self.step, self.real, self.host)
        return [Pairs(*parts) for parts in zip(*(c.split(size) for c in columns), strict=True)]

    @phase("gather and selection")
    def of_steps(self, column: Float[Tensor, "b k *d"] | None) -> Float[Tensor, "m *d"]:
        """The pairs' rows of a trajectory's column, on the pairs' device."""
        assert column is not None
        at = (self.image, self.step) if column.device == self.image.device else self.host.unbind(1)
        return copy_to_device(column[at], self.image.device)

    @phase("gather and selection")
    def of_images(self, embeds: Embeds | SharedEmbeds) -> Embeds:
        """The embeddings of the pairs' prompts, on the pairs' device."""
        image = self.image if embeds.device == self.image.device else self.host[:, 0]
        return copy_to_device(embeds[image], self.image.device)


def chosen_steps(key: tuple[int | str, ...], steps: int, selection: Any) -> list[int]:
    """The indices of the steps that an image trains, chosen by its own random stream."""
    return selection(steps, generator_for("selection", *key)).tolist()


def chosen_pairs(
    images: Sequence[tuple[int, tuple[int | str, ...]]], steps: int, selection: Any
) -> list[tuple[int, int]]:
    """The (row, column) pairs to train.

    Args:
        images: (row, key) of each image.
        steps: kept steps of a trajectory.
        selection: chooses the steps that an image trains.
    """
    return [(row, column) for row, key in images for column in chosen_steps(key, steps, selection)]


@dataclass(frozen=True, slots=True)
class Objective:
    """The objective to minimise.

    Attributes:
        method: its ratio, KL and loss scale.
    """

    policy: Policy
    method: MethodConfig
    clipped: Any

    def log_ratio(self, batch: Batch, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """log rho of each pair, the prediction behind it, and the pairs' rows of the plan."""
        trajectory, plan = batch.trajectory, batch.plan
        rows = trajectory.step.to(pairs.step.device)[pairs.step]
        step = plan.step_batch(
            rows,
            pairs.of_steps(trajectory.x).float(),
            pairs.of_steps(trajectory.prediction),
            pairs.of_steps(trajectory.noise).float(),
        )
        network = self.policy(step.x, plan.timesteps[rows], pairs.of_images(batch.embeds))
        reference = None if plan.scale is None else pairs.of_steps(trajectory.reference)
        prediction = plan.policy(rows, network, reference)
        return RATIOS[self.method.ratio](prediction, step), prediction, rows

    @phase(LOSS)
    def loss(self, batch: Batch, pairs: Pairs, total: int) -> tuple[Tensor, Tensor]:
        """The micro-batch's part of the loss, and its sums for the log.

        Args:
            total: pairs of the whole update, over all processes; one that images share counts for
                each of them.

        Returns:
            The loss, and `SUMS` numbers: |log rho| max, then sums of 1, loss, log rho, log rho^2,
            clipped, outside and KL, then the histogram of log rho.
        """
        log_ratio, prediction, rows = self.log_ratio(batch, pairs)
        terms = self.clipped(log_ratio, batch.advantages[pairs.image])
        loss = self.method.loss_scale * terms.loss
        if batch.plan.loss is not None:
            loss = batch.plan.loss[rows] * loss
        kl = torch.zeros_like(loss)
        if batch.trajectory.reference is not None and self.method.kl_weight > 0:
            reference = pairs.of_steps(batch.trajectory.reference)
            weight, interval = batch.plan.weight[rows], batch.plan.interval[rows]
            kl = KLS[self.method.kl](prediction, reference, weight, interval)
            if batch.plan.kl is not None:
                kl = batch.plan.kl[rows] * kl
            loss = loss + self.method.kl_weight * kl
        count = pairs.real.float() * batch.leaves
        seen = log_ratio.detach() * pairs.real
        sums = torch.stack(
            [
                seen.abs().max(),
                count.sum(),
                (loss.detach() * count).sum(),
                (seen * count).sum(),
                (seen.square() * count).sum(),
                (terms.clipped * count).sum(),
                (terms.outside * count).sum(),
                (kl.detach() * count).sum(),
            ]
        )
        counts = histogram(seen / self.method.clip_high, count)
        return (loss * count).sum() / total, torch.cat([sums, counts])


@phase("on-policy check", is_whole=True)
def check_on_policy(objective: Objective, batch: Batch, micro_batch: int) -> float:
    """Compare update with rollout before anything is trained.

    Args:
        batch: fresh trajectories of the present network.

    Returns:
        The largest |log rho| over the first images and all their steps; exactly 0 on a CPU, and
        where no step is trained.

    Raises:
        OnPolicyError: if it exceeds a tenth of the clip range.
        NotFiniteError: if it is no number.
    """
    images = range(min(micro_batch, len(batch.trajectory)))
    steps = range(len(batch.trajectory.step))
    if not steps:
        return 0.0
    chosen = [(image, step) for step in steps for image in images]
    pairs = Pairs.of(chosen, micro_batch, batch.advantages.device).split(micro_batch)
    largest = torch.stack([objective.log_ratio(batch, p)[0].detach().abs().max() for p in pairs])
    worst = largest.max().item()
    if not isfinite(worst):
        raise NotFiniteError(
            f"before any training log rho is {worst}, though the sampled latents are finite: the "
            "network's numbers overflow in the update; set model.precision to 'float32'"
        )
    allowed = 0.1 * min(objective.method.clip_low, objective.method.clip_high)
    if not worst <= allowed:
        raise OnPolicyError(
            f"before any training |log rho| is {worst:.2e}, but it must be below {allowed:.0e} (a "
            "tenth of the clip range): the update does not see what the rollout saw. Usual causes: "
            "latents stored in bfloat16 after use (set run.storage to 'float32' or "
            "run.storage_rounding to 'before'), dropout, or another precision in one of the two"
        )
    return worst


def accumulate(
    objective: Objective,
    batch: Batch,
    pairs: Pairs,
    total: int,
    micro_batch: int,
    backward: Callable[[Tensor], None],
) -> Tensor:
    """Add one update's gradients, micro-batch by micro-batch; their size changes no result.

    Args:
        pairs: this process's pairs of the update.
        total: pairs of the update over all processes.

    Returns:
        This process's sums, as `Objective.loss` describes them, on the device.
    """
    sums = []
    for part in pairs.split(micro_batch):
        loss, seen = objective.loss(batch, part, total)
        backward(loss)
        sums.append(seen)
    stacked = torch.stack(sums)
    return torch.cat([stacked[:, :1].amax(0), stacked[:, 1:].sum(0)])


def update(
    learner: Learner, objective: Objective, iteration: Iteration, batches: Sequence[Batch]
) -> list[dict[str, Any]]:
    """The iteration's optimizer steps, each on its own part of the images.

    Returns:
        The means of each update.
    """
    config, processes, size = learner.config, learner.processes, learner.config.run.micro_batch
    if iteration.number == 0:
        with processes.passes():
            worst = max(check_on_policy(objective, batch, size) for batch in batches)
        iteration.progress.say(f"on policy |log ratio| is {processes.largest(worst):.1e}")
    means, updates = [], config.optimizer.updates
    trees = torch.tensor(iteration.order).view(-1, iteration.tree)
    for turn, part in enumerate(trees.tensor_split(updates)):
        work, total = [], 0
        for segment, batch in zip(iteration.plan.segments, batches, strict=True):
            shares = _pairs_of(learner, iteration, part.flatten().tolist(), segment)
            total += batch.leaves * sum(map(len, shares))
            longest = -(-max(map(len, shares)) // size) if processes.is_sharded else 0
            if (chosen := shares[processes.rank]) or longest:
                work.append((batch, Pairs.of(chosen, size, processes.device, longest)))
        parts = sum(len(pairs.image) // size for _, pairs in work)
        bar = iteration.backward(processes.accelerator.backward, parts)
        sums = torch.zeros(SUMS, device=processes.device)
        with processes.passes():
            for batch, pairs in work:
                more = accumulate(objective, batch, pairs, total, size, bar)
                sums = torch.cat([torch.maximum(sums[:1], more[:1]), sums[1:] + more[1:]])
        means.append(learner.step(iteration.number * updates + turn, sums))
    return means


@phase("gather and selection")
def _pairs_of(
    learner: Learner, iteration: Iteration, part: list[int], segment: Segment
) -> list[list[tuple[int, int]]]:
    """For a part of the images, each process's (row of its trajectories, step) pairs.

    A path that images share trains the steps that are chosen for the first of them.
    """
    shares, processes, selection = [], learner.processes, learner.selection
    steps = int(iteration.plan.trained.sum())
    for rank in range(processes.count):
        mine = processes.share(iteration.order, rank, iteration.tree)
        row_of = {image: row for row, image in enumerate(mine[:: segment.leaves])}
        owned = [(row_of[i], iteration.requests[i].key) for i in part if i in row_of]
        chosen = [(row, chosen_steps(key, steps, selection)) for row, key in owned]
        shares.append([(row, step) for row, all_ in chosen for step in segment.own(all_)])
    return shares
