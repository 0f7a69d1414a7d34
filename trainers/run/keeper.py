"""What a run leaves in its folder: metrics, samples, exports, checkpoints, report and status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distributed.sharding import gather_tensors
from ..errors import Stopped
from ..job.folder import JobFolder
from ..job.metrics import lines_of
from ..lora import adapters
from ..lora.base_notes import marks_of, notes_on_base
from ..report.progress import Progress
from ..report.refresh import Reporter
from ..report.tensorboard import Tracker
from . import checkpoint
from .checkpoint import Position
from .endings import Result, check_there, held_out_change
from .give_back_memory import memory_given_back
from .guard.guard import Guard, best_export
from .held_out import Evaluated, evaluate, first_evaluation, keep_samples
from .phases import phase
from .publish import Published
from .setup import Setup
from .tastes import Tastes

EQUAL = "all images that are compared have equal rewards: it can learn nothing from them"
"""Message of an iteration."""
Weights = dict[str, Tensor] | None
"""A split network's weights, gathered on the first process; None if the network is not split."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """Keeps a run's results.

    Attributes:
        first: the held-out prompts' images before training.
        guard: of the run, or None.
        published: keeps `run.publish` up to date.
    """

    setup: Setup
    folder: JobFolder
    progress: Progress
    reporter: Reporter
    first: Evaluated
    guard: Guard | None
    tracker: Tracker
    published: Published

    @classmethod
    def of(cls, setup: Setup, reporter: Reporter, progress: Progress, at: Position) -> Keeper:
        """Begin to keep a run's results: evaluate the base model, if that is not done yet."""
        config, folder, is_first = setup.config, reporter.folder, setup.processes.is_first
        folder.status("running", iteration=at.iteration, of=config.run.iterations)
        first = first_evaluation(setup, folder, progress, at)
        guard = Guard.of(setup, folder, progress, at)
        tracker = Tracker.of(config, folder, at.iteration) if is_first else Tracker(None)
        published = Published(folder, config.run.publish if is_first else None, progress.say)
        return cls(setup, folder, progress, reporter, first, guard, tracker, published)

    def keep(self, at: Position, line: dict[str, Any]) -> Position:
        """Evaluate an iteration if it is time, and write its results, its checkpoint last.

        A run that ends before that repeats the iteration.

        Args:
            at: the run's progress before the iteration.
            line: of metrics.jsonl; what is measured here is added.
        """
        run = self.setup.config.run
        iteration, count = at.iteration + 1, run.iterations
        verdict = None if self.guard is None else self.guard.look(at, count)
        is_saved = iteration % run.save_every == 0 or iteration == count
        is_saved = is_saved or (verdict is not None and verdict.is_kept)
        now, best = evaluate(self.setup) if is_saved else None, at.best
        if now is not None and now.scores:
            line["held_out"] = now.mean
            if self.guard is None and (best is None or now.mean > best[0]):
                best = (now.mean, iteration)
        at = replace(at, iteration=iteration, best=best)
        line |= self.tastes.measured(self.setup.processes)
        if verdict is not None:
            line |= verdict.line
            at = replace(at, best=verdict.best, strikes=verdict.strikes)
        self._write(at, line, now)
        if now is not None:
            self.published.update(best_export(self.folder, at, self.guard))
            with self.setup.processes.in_agreement():
                self.reporter.update()
        self.tracker.add(line)
        place = {"iteration": iteration, "of": count}
        place |= {"eta_seconds": self.progress.iteration(line, count), **self.published.fields}
        if line["frac_advantage_zero"] == 1:
            self.progress.say(f"iteration {iteration}: {EQUAL}")
            place |= {"message": EQUAL}
        self.folder.status("running", **place)
        return at

    @property
    def tastes(self) -> Tastes:
        return self.setup.reward_set.tastes

    def renew_tastes(self, number: int) -> None:
        """Let votes that came meanwhile count from the iteration of this number, from 0, on."""
        setup, say = self.setup, self.progress.say
        self.tastes.renew(number, self.folder, setup.config, setup.processes, say)

    def _write(self, at: Position, line: dict[str, Any], now: Evaluated | None) -> None:
        setup, folder = self.setup, self.folder
        is_due = at.iteration % setup.config.run.checkpoint_every == 0 or now is not None
        tensors = checkpoint.tensors_of(setup) if is_due else None
        weights = weights_of(setup) if now is not None else None
        with setup.processes.in_agreement():
            if not setup.processes.is_first:
                return
            folder.add_metrics(line)
            self.tastes.ask(at.iteration, line, folder, setup.config, self.progress.say)
            if now is not None:
                self._export(at.iteration, now, weights)
            if tensors is not None:
                checkpoint.save(setup, folder, at, tensors)

    @phase("report and export")
    def _export(self, iteration: int, now: Evaluated, weights: Weights) -> None:
        if now.scores:
            keep_samples(self.folder, iteration, now, self.setup.held_out)
        export(self.setup, self.folder, iteration, weights)

    def show(self, iteration: int) -> None:
        """Write samples that were asked for."""
        now = evaluate(self.setup)
        with self.setup.processes.in_agreement():
            if self.setup.processes.is_first:
                keep_samples(self.folder, iteration, now, self.setup.held_out)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Write a report, and give the GPU's memory back while the run waits within it."""
        with memory_given_back(self.setup):
            with suppress(OSError):
                self.reporter.write()
            yield

    @contextmanager
    def saved_if_stopped(self, at: Position) -> Iterator[None]:
        """Save a checkpoint and an export if the run is stopped within it, and publish the best."""
        try:
            yield
        except Stopped as stopped:
            if not stopped.is_midway and at.iteration > 0:
                self._save(at)
            note = self.published.update(best_export(self.folder, at, self.guard))
            raise Stopped(f"{stopped}{note}") from stopped

    def _save(self, at: Position) -> None:
        setup = self.setup
        tensors, weights = checkpoint.tensors_of(setup), weights_of(setup)
        with setup.processes.in_agreement():
            if setup.processes.is_first:
                checkpoint.save(setup, self.folder, at, tensors)
                export(setup, self.folder, at.iteration, weights)

    def finish(self, at: Position) -> Result:
        """Report the outcome: at the last iteration, or at the best that the guard has seen."""
        folder, guard = self.folder, self.guard
        self.tracker.close()
        chosen, after = best_export(folder, at, guard), at.before
        last = at.best[1] if guard is not None and at.best is not None else at.iteration
        for line in lines_of(folder.metrics_file, "held_out"):
            after = line["held_out"] if line["iteration"] <= last else after
        with self.setup.processes.in_agreement():
            check_there(folder)
            message = held_out_change(at.before, after)
            if guard is not None:
                message = f"{folder.guard_record().get('said')}; {message}"
            message += _equal_rewards(folder, at) + self.published.update(chosen)
            place = {"iteration": at.iteration, "of": self.setup.config.run.iterations}
            folder.status("done", **place, message=message)
            self.reporter.write()
        return Result(at.before, after, chosen, folder.root, at.iteration)


def weights_of(setup: Setup) -> Weights:
    """Gather the weights to export of a split network; every process must call this."""
    if not setup.processes.is_sharded:
        return None
    with setup.learner.with_exported():
        return gather_tensors(setup.family.network.state_dict(), setup.processes.is_first)


def export(setup: Setup, folder: JobFolder, iteration: int, weights: Weights = None) -> Path:
    """Write the LoRA (or the network) after `iteration` iterations; `weights` from `weights_of`."""
    method = setup.config.method
    metadata = {
        "pcpo_iteration": iteration,
        "pcpo_method": f"{method.credit}/{method.objective}",
        "pcpo_rewards": ", ".join(setup.reward_set.labels),
        **notes_on_base(setup.family, setup.config.model.source),
    }
    network, file = setup.family.network, folder.export(iteration)
    marks = marks_of(setup.family)
    if weights is not None:
        return adapters.export_unet(network, file, metadata=metadata, weights=weights, marks=marks)
    with setup.learner.with_exported():
        if setup.config.trainable.kind == "lora":
            return adapters.export_lora(network, file, metadata=metadata)
        return adapters.export_unet(network, file, metadata=metadata, marks=marks)


def _equal_rewards(folder: JobFolder, at: Position) -> str:
    """A clause on iterations without anything to learn from; empty if there were none."""
    name = "frac_advantage_zero"
    count = sum(line[name] == 1 for line in lines_of(folder.metrics_file, name))
    if not count:
        return ""
    return (
        f"; nothing could be learnt in {count} of {at.iteration} iterations, whose rewards were "
        "equal: take another reward, other prompts or more images of each"
    )
