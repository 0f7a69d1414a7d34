"""The held-out comparison: images at fixed seeds, their rewards, and the files kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..finite import naming_step
from ..job.files import write_json
from ..job.folder import JobError, JobFolder
from ..report.images import Images, load_images, save_images
from ..report.progress import Progress
from .checkpoint import Position
from .endings import check_there
from .phases import phase
from .plans import looking_plan
from .rewards import RewardSet
from .sampler import Request, Sampler
from .setup import Setup


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The held-out prompts' images at fixed seeds, and their rewards.

    Attributes:
        scores: of each image, all rewards in one number.
        parts: each reward's own values by its label; empty if they were read from disk.
    """

    images: Images
    scores: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean reward; NaN without held-out prompts."""
        return sum(self.scores) / len(self.scores) if self.scores else float("nan")


@phase("evaluation", is_whole=True)
def evaluate(setup: Setup) -> Evaluated:
    """Sample the held-out prompts at fixed seeds without noise, and score the images."""
    offset = len(setup.prompts)
    requests = [Request(offset + i, ("evaluation", i)) for i in range(len(setup.held_out))]
    if not requests:
        return Evaluated(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), [])
    images, (rewards,) = sample_and_score(setup, requests, [setup.reward_set])
    scores = setup.reward_set.scale_for_display(rewards).tolist()
    parts = dict(zip(setup.reward_set.labels, rewards.tolist(), strict=True))
    return Evaluated(images, scores, parts)


def sample_and_score(
    setup: Setup, requests: Sequence[Request], reward_sets: Sequence[RewardSet]
) -> tuple[Images, list[Tensor]]:
    """Sample held-out prompts with the exported weights, and score the images.

    Args:
        requests: one at least, distributed over the processes.

    Returns:
        In every process all images, and for each set (rewards, images).
    """
    order, processes = range(len(requests)), setup.processes
    mine, offset = processes.share(order), len(setup.prompts)
    with processes.passes(), setup.learner.with_exported(), naming_step("held-out prompts"):
        filled = processes.pad(mine, len(requests))
        images = _sampler(setup)([requests[i] for i in filled]).images[: len(mine)]
    prompts = [setup.held_out[requests[i].prompt - offset] for i in mine]
    with processes.in_agreement():
        own = [each.score(images, prompts) for each in reward_sets]
    rewards = [processes.gather(scores, order).T for scores in own]
    return processes.gather(images, order), rewards


def _sampler(setup: Setup) -> Sampler:
    """The comparison's sampler, the same for every method, at its own steps and noise."""
    run, shape = setup.config.run, setup.sampler.shape
    sampler = setup.config.sampler
    plan = looking_plan(setup.family, shape, run.eval_steps, run.eval_noise, sampler)
    policy = setup.sampler.untrained or setup.sampler.policy
    changed = replace(setup.sampler, policy=policy, reference=None, decode="final")
    return changed.under(plan.to(setup.processes.device))


def keep_samples(folder: JobFolder, iteration: int, now: Evaluated, prompts: Sequence[str]) -> None:
    check_there(folder)
    place = folder.samples / f"{iteration:05}"
    save_images(now.images, place)
    lines: list[dict[str, Any]] = []
    for i, (prompt, score) in enumerate(zip(prompts, now.scores, strict=True)):
        parts = {label: values[i] for label, values in now.parts.items()}
        more = {"parts": parts} if len(parts) > 1 else {}
        lines.append({"prompt": prompt, "reward": score, **more})
    write_json(place / "scores.json", lines)


def first_evaluation(
    setup: Setup, folder: JobFolder, progress: Progress, at: Position
) -> Evaluated:
    """The base model's images, sampled once; a resumed run reads them back."""
    kept = setup.processes.decide(lambda: _stored(setup, folder) if at.iteration > 0 else None)
    if kept is not None:
        return kept
    if at.iteration > 0 and setup.held_out:
        progress.say("the images of the base model are gone: the comparison starts from here")
    first = evaluate(setup)
    with setup.processes.in_agreement():
        if setup.processes.is_first:
            keep_samples(folder, at.iteration, first, setup.held_out)
    if setup.held_out:
        progress.say(f"held-out reward before training: {first.mean:.3f}")
    return first


def _stored(setup: Setup, folder: JobFolder) -> Evaluated | None:
    """The base model's stored images, if they are still there."""
    files = [folder.samples / "00000" / f"{i:03}.png" for i in range(len(setup.held_out))]
    scores = folder.scores(0)
    if not files or len(scores) != len(files) or not all(file.is_file() for file in files):
        return None
    try:
        return Evaluated(load_images(files), [entry["reward"] for entry in scores])
    except JobError:  # they are made again
        return None
