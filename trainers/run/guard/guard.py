"""The guard of a run: it evaluates held-out images every few iterations, and acts on the result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ....pcpo.metrics.similarity import rms
from ...job.files import write_json
from ...job.folder import JobError, JobFolder
from ...report.images import Images, load_images, save_images
from ...report.progress import Progress
from ..checkpoint import Position
from ..held_out import sample_and_score
from ..sampler import Request
from ..setup import Setup
from .measures import Measures
from .rules import Look, Rules, Verdict, start_of

BASE, RECORD = "base", "guard.json"
"""Names in the job folder's `guard/`."""


@dataclass(frozen=True, slots=True)
class Guard:
    """The guard of a run that has one.

    Attributes:
        base: the base's images, in the first process.
    """

    setup: Setup
    folder: JobFolder
    measures: Measures
    rules: Rules
    base: Images | None
    progress: Progress

    @classmethod
    def of(cls, setup: Setup, folder: JobFolder, progress: Progress, at: Position) -> Guard | None:
        """Measure the base, or read its measurements back when the run resumes.

        None if the run has no guard; `JobError` if the base's images are gone.
        """
        if setup.measures is None:
            return None
        count = min(setup.config.guard.prompts, len(setup.held_out))
        config = setup.config.guard.model_copy(update={"prompts": count})
        if at.iteration > 0:
            start, base = setup.processes.decide(lambda: _stored_base(folder)), None
            if setup.processes.is_first:
                base = load_images(sorted((folder.guard / BASE).glob("*.png")))
            return cls(setup, folder, setup.measures, Rules(config, start), base, progress)
        images, start = _measure_images(setup, setup.measures, count, None)
        guard = cls(setup, folder, setup.measures, Rules(config, start), images, progress)
        with setup.processes.in_agreement():
            if setup.processes.is_first:
                save_images(images, folder.guard / BASE)
        guard._keep(None)
        progress.say(guard.rules.sentence)
        return guard

    def look(self, at: Position, of: int) -> Verdict | None:
        """Measure an iteration's images if it is time; the last of `of` iterations always is.

        Args:
            at: the run's progress before the iteration.

        Returns:
            The verdict, the same in every process; None if it is not time.
        """
        iteration, every = at.iteration + 1, self.rules.config.every
        if iteration % every and iteration != of:
            return None
        _, look = _measure_images(self.setup, self.measures, self.rules.config.prompts, self.base)
        verdict = self.rules.assess(look, iteration, at.strikes, at.best)
        self._keep(verdict)
        self.progress.say(self.rules.describe(verdict))
        return verdict

    def _keep(self, verdict: Verdict | None) -> None:
        """Write the record that others read."""
        with self.setup.processes.in_agreement():
            if self.setup.processes.is_first:
                write_json(self.folder.guard / RECORD, self.rules.record(verdict))


def best_export(folder: JobFolder, at: Position, guard: Guard | None) -> Path | None:
    """The export to use: the newest, or the best within a guard's bounds."""
    best = guard is not None and at.best is not None and folder.exports().get(at.best[1])
    return best or folder.last_export()


def _measure_images(
    setup: Setup, measures: Measures, prompts: int, base: Images | None
) -> tuple[Images, Look]:
    """Images at the guard's prompts and seeds, and their measurements."""
    offset, images = len(setup.prompts), setup.config.guard.images
    keys = [(i, j) for i in range(prompts) for j in range(images)]
    requests = [Request(offset + i, ("guard", i, j)) for i, j in keys]
    reward_sets = [setup.reward_set] + ([] if measures.second is None else [measures.second])
    images_now, rewards = sample_and_score(setup, requests, reward_sets)

    def look() -> Look:
        drift = 0.0 if base is None else _mean(rms(images_now, base))
        second = _mean(rewards[1]) if measures.second is not None else None
        reward = _mean(setup.reward_set.scale_for_display(rewards[0]))
        return Look(reward, measures.spread(images_now.split(images)), drift, second)

    return images_now, setup.processes.decide(look)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _stored_base(folder: JobFolder) -> Look:
    """The stored measurements of the base."""
    record, base = folder.guard_record(), folder.guard / BASE
    if not record.get("values") or not any(base.glob("*.png")):
        raise JobError(
            f"what the guard compares with is gone from {folder.guard}; put it back, or start a "
            "new run"
        )
    return start_of(record)
