"""An iteration in one pass: the rollout's own forward pass is the one that is trained.

On policy rho is 1 and nothing is clipped, so the gradient of an update is a sum of the images' own
gradients of log rho, each times a factor that follows from its advantage: -A for every objective
here. The gradients are taken while an image is sampled, and wait for its reward. What two passes
compute twice is computed once, and no latent is kept.

Each of several updates per iteration has images of its own, sampled by the policy it updates. That
is stricter than the paper, where the updates after the first are off policy.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....pcpo import KLS, RATIOS
from ....pcpo.objectives import slope_on_policy
from ....pcpo.per_sample import SampleGradients, weighted_sum
from ....pcpo.plan import Segment
from ....pcpo.ratios import StepBatch
from ....pcpo.rollout import rollout_with_gradient
from ...config.train_config import TrainConfig, compares_within_prompts
from ...errors import Stopped
from ...finite import naming_step
from ...memory.trajectory_store import copy_to_device, copy_to_store
from ..iteration import Iteration, Results
from ..phases import phase
from ..rewards import Scoring
from ..sampler import Part
from ..setup import Setup
from .learner import sums_on_policy
from .two_pass import chosen_steps

Held = list[list[list[Float[Tensor, "b *w"]]]]
"""Gradients of log rho that wait for advantages: of each segment's micro-batches, by layer."""


def one_pass(setup: Setup, iteration: Iteration) -> Results:
    """Sample with gradient, score, compare, update: once for each update.

    A LoRA is trained.

    Raises:
        Stopped: if that is requested while it samples; midway after the first update.
    """
    if iteration.number == 0:
        said = "one pass: each step is learnt as it is taken; |log ratio| is always 0"
        iteration.progress.say(said)
    config, processes, prompts = setup.config, setup.processes, iteration.prompts
    parts = [units_of(config, part, prompts, processes.count) for part in parts_of(config)]
    tree, together = iteration.tree, processes.share
    own = sum(len(together(unit, tree=tree)) for units in parts for unit in units)
    advance = iteration.sampling(own, in_step=processes.is_sharded, changes=len(parts) > 1)
    work = _Work(setup, iteration, advance)
    rewards = torch.zeros(len(setup.reward_set.rewards), len(prompts))
    advantages, updates = torch.zeros(len(prompts)), []
    try:
        for turn, units in enumerate(parts):
            work.begin([image for unit in units for image in unit])
            for unit in _delay(map(work.sample, units), int(setup.reward_set.is_elsewhere)):
                rewards[:, unit.images], advantages[unit.images] = work.learn(unit)
            updates.append(work.step(iteration.number * len(parts) + turn))
    except Stopped as stopped:
        stopped.is_midway = bool(updates)
        raise
    return Results(rewards, advantages, updates, work.seconds)


def parts_of(config: TrainConfig) -> list[list[int]]:
    """The images of each update: all those of its prompts."""
    images = torch.arange(config.images).view(config.prompts.per_iteration, -1)
    return [part.flatten().tolist() for part in images.tensor_split(config.optimizer.updates)]


def units_of(
    config: TrainConfig, part: list[int], prompts: Sequence[str], processes: int
) -> list[list[int]]:
    """Split an update's images into units that are scored and compared by themselves.

    All are one unit if each is compared with all; else each unit has as few prompts as give every
    process a full micro-batch. `prompts` are those of all images.
    """
    if not compares_within_prompts(config.advantage, config.reward_parts.values()):
        return [part]
    by_prompt: dict[str, list[int]] = {}
    for image in part:  # by text, as advantages: two lines of a prompt file may be equal
        by_prompt.setdefault(prompts[image], []).append(image)
    enough, units = config.run.micro_batch * processes, [[]]
    for images in by_prompt.values():
        if len(units[-1]) >= enough:
            units.append([])
        units[-1] += images
    return units


def _delay(units: Iterable[_Unit], lag: int) -> Iterator[_Unit]:
    """The same units, each delayed until `lag` more have come, or all."""
    waiting = deque[_Unit]()
    for unit in units:
        waiting.append(unit)
        if len(waiting) > lag:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True, slots=True)
class _Unit:
    """Sampled images that wait for their rewards.

    Attributes:
        scoring: the source of their rewards.
    """

    images: list[int]
    held: Held
    scoring: Scoring


@dataclass(slots=True)
class _Work:
    """An iteration in progress.

    Attributes:
        advance: called with the number of this process's finished images.
        seconds: spent on what follows the rewards.
        steps: of each image of the present update, which of the trained steps it trains.
        seen: of this process's pairs: their number, and the sums of loss and KL.
    """

    setup: Setup
    iteration: Iteration
    advance: Callable[[int], None]
    done: int = 0
    seconds: float = 0.0
    steps: dict[int, list[int]] = field(default_factory=dict)
    seen: Float[Tensor, " 3"] = field(default_factory=lambda: torch.zeros(3))

    @property
    def total(self) -> int:
        """Pairs of image and step of the present update, over all processes."""
        return sum(map(len, self.steps.values()))

    @property
    def per_sample(self) -> SampleGradients:
        """Of the trained layers."""
        assert self.setup.learner.per_sample is not None
        return self.setup.learner.per_sample

    def begin(self, images: Sequence[int]) -> None:
        """Begin an update on images of all processes."""
        trained = int(self.iteration.plan.trained.sum())
        self.steps, self.seen = {}, torch.zeros(3, device=self.setup.processes.device)
        for image in images:
            key = self.iteration.requests[image].key
            self.steps[image] = chosen_steps(key, trained, self.setup.learner.selection)

    def sample(self, unit: list[int]) -> _Unit:
        """Sample images, whose gradients then wait for their rewards."""
        setup, prompts = self.setup, [self.iteration.prompts[image] for image in unit]
        order, tree = range(len(unit)), self.iteration.tree
        scoring = Scoring(setup.reward_set, setup.processes, prompts, order, tree)
        with setup.processes.passes(), naming_step(f"iteration {self.iteration.number + 1}"):
            held = self._sample_unit([unit[row] for row in scoring.mine], scoring.see)
        return _Unit(unit, held, scoring)

    def learn(self, unit: _Unit) -> tuple[Float[Tensor, "rewards b"], Float[Tensor, " b"]]:
        """Add a unit's gradients when its rewards are there, and free them."""
        rewards = unit.scoring.rewards()
        started, mine = time.monotonic(), unit.scoring.mine
        plan, prompts = self.iteration.plan, unit.scoring.prompts
        advantages = self.setup.advantages.of_paths(rewards, prompts, plan.branches)
        for segment, values, held in zip(plan.segments, advantages, unit.held, strict=True):
            first = mine[:: segment.leaves]
            if segment.plan.trained.any():
                steps = self._steps_of([unit.images[row] for row in first], segment)
                self._add(segment, steps, values[[row // segment.leaves for row in first]], held)
        unit.held.clear()
        self.seconds += time.monotonic() - started
        return rewards, advantages[-1]

    def step(self, done: int) -> dict[str, Any]:
        """End the update with the optimizer's step, and return the means of the update."""
        started = time.monotonic()
        means = self.setup.learner.step(done, sums_on_policy(*self.seen))
        self.seconds += time.monotonic() - started
        return means

    def _sample_unit(self, images: list[int], see: Callable[[Tensor], None]) -> Held:
        """The waiting gradients of this process's part of a unit; `see` gets the pixels."""
        sampler = self.setup.sampler.under(self.iteration.plan)
        requests, before = [self.iteration.requests[image] for image in images], self.done

        def sample(part: Part) -> tuple[list[Tensor], Tensor, Tensor]:
            first = images[:: part.segment.leaves]
            chosen = self._steps_of([first[row] for row in part.rows], part.segment)
            final, clean, gradients = self._sample_batch(part, chosen)
            count = len(part.rows)
            with phase("gather and selection"):
                held = [copy_to_store(rows[:count], sampler.place) for rows in gradients]
            return held, final[:count], clean[:count]

        def advance(done: int) -> None:
            self.done = before + done
            self.advance(self.done)

        return sampler.each(requests, sample, advance, see, self._rows)

    def _rows(self, segment: Segment) -> int:
        """Paths per forward pass: those of a micro-batch of images, for a unit may be no more."""
        return max(1, self.setup.config.run.micro_batch // segment.leaves)

    def _steps_of(self, images: Sequence[int], segment: Segment) -> list[list[int]]:
        """The steps of a segment's plan that each of its paths trains, by their first images."""
        rows = segment.plan.trained.nonzero().flatten().tolist()
        return [[rows[step] for step in segment.own(self.steps[image])] for image in images]

    def _sample_batch(
        self, part: Part, chosen: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, list[Float[Tensor, "b *w"]]]:
        """Sample a full micro-batch; nothing here waits for the device.

        Args:
            chosen: for each path, the steps of the plan to train; padding has none.

        Returns:
            Latents after the last step, clean estimates of the last step, and each sample's
            gradient of the sum of its chosen log ratios, by trained layer; no layers if the segment
            trains no step.
        """
        sampler, batch, plan = part.sampler, part.batch, part.sampler.plan
        if not plan.trained.any():
            path = sampler.rollout(batch)
            return path.final, path.clean, []
        method, given = self.setup.config.method, sampler.inputs(batch)
        backward, kl_weight = self.setup.processes.accelerator.backward, method.kl_weight
        mask = torch.zeros(len(plan), len(batch))
        for row, steps in enumerate(chosen):
            mask[list(steps), row] = 1
        counted = copy_to_device(mask, sampler.device)
        kl = torch.zeros((), device=sampler.device)

        def learn(i: int, prediction: Tensor, step: StepBatch, frozen: Tensor | None) -> None:
            compared = frozen if kl_weight > 0 else None  # a relative policy has one without KL
            log_ratio = RATIOS[method.ratio](prediction, step)
            backward((log_ratio * counted[i]).sum(), retain_graph=compared is not None)
            if compared is None:
                return
            rows = (column[i].expand(len(batch)) for column in (plan.weight, plan.interval))
            divergence = KLS[method.kl](prediction, compared, *rows)
            summed = part.segment.leaves * (divergence * counted[i]).sum()
            if plan.kl is not None:
                summed = plan.kl[i] * summed
            kl.add_(summed.detach())
            with self.per_sample.added():
                backward(kl_weight / self.total * summed)

        with self.per_sample.of(len(batch)), phase("step arithmetic"):
            final, clean = rollout_with_gradient(
                given.denoiser,
                plan,
                given.noise,
                learn,
                mask.any(dim=1).nonzero().flatten().tolist(),
                reference=given.reference,
                untrained=given.untrained,
                storage=sampler.options.get("storage", torch.float32),
            )
            gradients = self.per_sample.taken()
        self.seen[1:] += torch.stack([kl_weight * kl, kl])
        return final, clean, gradients

    @phase("gradients by advantage")
    def _add(
        self,
        segment: Segment,
        steps: Sequence[Sequence[int]],
        advantages: Float[Tensor, " paths"],
        held: list[list[Float[Tensor, "b *w"]]],
    ) -> None:
        """Add the gradients of a segment's paths, whose advantages are known."""
        device = self.setup.processes.device
        slope, loss = slope_on_policy(self.setup.objective.clipped, advantages.to(device))
        scale = self.setup.config.method.loss_scale
        counts = segment.leaves * torch.tensor([float(len(own)) for own in steps], device=device)
        self.seen[:2] += torch.stack([counts.sum(), scale * (counts * loss).sum()])
        factors = slope * (scale * segment.leaves) / self.total
        parts = factors.split(self._rows(segment))
        for weights, gradients in zip(parts, held, strict=True):
            for layer, rows in zip(self.per_sample.layers, gradients, strict=True):
                weight = layer.weight
                change = weighted_sum(weights, copy_to_device(rows, device)).to(weight.dtype)
                weight.grad = change if weight.grad is None else weight.grad.add_(change)
