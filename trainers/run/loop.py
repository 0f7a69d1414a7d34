"""The training loop, from top to bottom.

for each iteration:
    sample images with the present policy        (sampler.py, pcpo.rollout)
    score them                                   (pcpo.rewards)
    compare them with each other                 (pcpo.advantages)
    move the policy towards the better ones      (update, pcpo.objectives)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..config.train_config import TrainConfig, validate_stored
from ..distributed.launcher import folder_of, is_first
from ..distributed.processes import in_contact
from ..errors import RunError, Stopped
from ..families.source import fingerprint
from ..job.folder import JobError, JobFolder, Onlooker
from ..job.inputs import check_inputs, inputs_of, keep_prompts, kept_prompts
from ..job.metrics import lines_of
from ..job.preflight import check_folder, model_source
from ..job.prompts import PromptSplit, split_prompts
from ..report.progress import Progress
from ..report.refresh import Reporter
from ..report.tensorboard import Tracker
from . import checkpoint
from .checkpoint import Position
from .control import Control, check_there, note_end, unless_deleted
from .give_back_memory import resting
from .guard.guard import Guard, best_export
from .guard.rules import Verdict
from .held_out import Evaluated, evaluate, export, first_evaluation, keep, keep_samples, weights_of
from .iteration import one_iteration
from .publish import Published, check_publish
from .setup import Setup, prepare

EQUAL = "all images that are compared have equal rewards: it can learn nothing from them"
"""Message of an iteration."""


@dataclass(frozen=True, slots=True)
class Result:
    """The results of a run.

    Attributes:
        before: mean reward on the held-out prompts, before training.
        after: the same after it.
        export: the last exported file (with a guard, the best within its bounds), None if the run
            was stopped before its first one.
        folder: of all its files.
        iteration: finished iterations.
    """

    before: float
    after: float
    export: Path | None
    folder: Path
    iteration: int


def train(config: TrainConfig, root: Path, progress: Progress | None = None) -> Result:
    """Run a config to its end.

    `ConfigError` if the folder holds a run (`check_folder`) or the config cannot be run
    (`check_publish`, `prepare`).

    Args:
        config: of the run.
        root: where it writes; must not hold a run already.
        progress: shows what happens; silent if None.

    Raises:
        RunError: if the folder was deleted while the model was loaded.
    """
    progress = progress or Progress.silent()
    folder = folder_of(root)
    with folder.held():
        if is_first():
            check_folder(root)
            check_publish(config)
        setup = prepare(config, progress.say)
        inputs = {"model": fingerprint(model_source(config.model.source))}
        inputs |= {"rewards": _fingerprints(setup)}
        split = PromptSplit(setup.prompts, setup.held_out)
        inputs |= inputs_of(config, split)
        job = {"config": config.model_dump(mode="json"), "inputs": inputs}
        with setup.processes.agreed():
            if not root.is_dir():
                raise RunError(f"the job folder {root} was deleted while the model was loaded")
            keep_prompts(folder, split)
            folder.start(job | {"versions": checkpoint.machine()})
        for note in setup.notes:
            progress.say(note)
        return _run(setup, folder, progress, Position())


def resume(root: Path, progress: Progress | None = None, iterations: int | None = None) -> Result:
    """Resume a run from its last good checkpoint, to the same bytes.

    `JobError` if another process works in the folder, and as `go_on`.

    Args:
        root: the job folder.
        progress: shows what happens; silent if None.
        iterations: a new number of iterations in all; the run's own if None.
    """
    folder = folder_of(root)
    folder.job()
    with folder.held():
        return go_on(folder, progress or Progress.silent(), iterations)


def go_on(
    folder: JobFolder,
    progress: Progress,
    iterations: int | None = None,
    server: Path | None = None,
) -> Result:
    """The same in a folder that this process holds; without a checkpoint the run begins.

    `server` is the folder of ComfyUI's jobs, if ComfyUI started this run. `JobError` if there is no
    run, its model changed, or no checkpoint is intact (see `checkpoint.newest`).
    """
    with unless_deleted(folder):
        setup, at = _loaded(folder, progress, iterations)
    return _run(setup, folder, progress, at, server)


def _loaded(
    folder: JobFolder, progress: Progress, iterations: int | None
) -> tuple[Setup, Position]:
    """Restore a run from its last intact checkpoint, and write its inputs anew."""
    root, job = folder.root, folder.job()
    config = validate_stored(job["config"], str(root / "job.json"))
    if iterations is not None:
        run = {**job["config"].get("run", {}), "iterations": iterations}
        config = validate_stored({**job["config"], "run": run}, "--iterations")
        job["config"] = config.model_dump(mode="json")
    newest, notes = checkpoint.newest(folder, config)
    model = fingerprint(model_source(config.model.source))
    if job.setdefault("inputs", {}).setdefault("model", model) != model:
        raise JobError(
            f"the model {config.model.source} is not the one that {root} was started with; "
            "put it back, or start a new run"
        )
    kept = kept_prompts(folder)
    split = kept or split_prompts(config.prompts, config.run.eval_prompts)
    notes += check_inputs(job["inputs"], config, split, root)
    setup = prepare(config, progress.say, split)
    notes += _check_rewards(setup, job["inputs"], root)
    at, newest = Position(), setup.processes.decided(lambda: newest)
    with setup.processes.agreed():
        if newest is not None:
            at, differences = checkpoint.load(setup, newest)
            notes += differences
    for note in [*setup.notes, *notes]:
        progress.say(note)
    progress.say(f"going on after iteration {at.iteration}")
    job.setdefault("versions", checkpoint.machine())
    with setup.processes.agreed():
        check_there(folder)
        if kept is None:
            keep_prompts(folder, split)
        folder.start(job)
        folder.cut_metrics(at.iteration)
    return setup, at


def _fingerprints(setup: Setup) -> dict[str, dict[str, Any]]:
    """What the numbers of each reward depend on, including the guard's."""
    return setup.judges.fingerprints() | (setup.measures.fingerprints() if setup.measures else {})


def _check_rewards(setup: Setup, inputs: dict[str, Any], root: Path) -> list[str]:
    """Refuse to resume with other rewards than before; note it if only their versions differ."""
    notes, now = [], _fingerprints(setup)
    for label, before in inputs.setdefault("rewards", now).items():
        same, other = (
            {k: v for k, v in f.items() if k != "versions"} for f in (before, now[label])
        )
        if same != other:
            raise JobError(
                f"the reward {label!r} is not the one that {root} was started with "
                f"({', '.join(k for k in {*same, *other} if same.get(k) != other.get(k))}); put "
                "its files back, or start a new run"
            )
        if before != now[label]:
            notes.append(f"the reward {label!r} has other versions than at the start")
    return notes


def _run(
    setup: Setup, folder: JobFolder, progress: Progress, at: Position, server: Path | None = None
) -> Result:
    """Run the loop, and record in the folder how it ends; `RunError` if that cannot be written."""
    control = Control(folder, server, setup.processes.decided)
    with control.signals():  # also while it is said how it ended
        return _held_to(setup, folder, progress, control, at)


def _held_to(
    setup: Setup, folder: JobFolder, progress: Progress, control: Control, at: Position
) -> Result:
    log = progress.logging(folder.log) if setup.processes.is_first else nullcontext()
    reporter = Reporter(folder, setup.config)
    try:
        with unless_deleted(folder), log, in_contact():
            return _train(setup, folder, progress, control, at, reporter)
    except (OSError, SafetensorError) as error:
        broken = RunError(f"the run cannot write: {error}; put that right and resume")
        for note in getattr(error, "__notes__", ()):
            broken.add_note(note)
        _end(reporter, broken)
        raise broken from error
    except BaseException as error:
        _end(reporter, error)
        raise


def _end(reporter: Reporter, error: BaseException) -> None:
    if isinstance(reporter.folder, Onlooker):
        return
    note_end(reporter.folder, error)
    with suppress(OSError):
        if reporter.folder.is_used():
            reporter.write()


def _train(
    setup: Setup,
    folder: JobFolder,
    progress: Progress,
    control: Control,
    at: Position,
    reporter: Reporter,
) -> Result:
    config, count = setup.config, setup.config.run.iterations
    folder.status("running", iteration=at.iteration, of=count)
    first = first_evaluation(setup, folder, progress, at)
    guard = Guard.of(setup, folder, progress, at)
    if at.iteration == 0:
        at = replace(at, before=first.mean)
    writes = setup.processes.is_first
    tracker = Tracker.of(config, folder, at.iteration) if writes else Tracker(None)
    published = Published(folder, config.run.publish if writes else None, progress.say)
    for iteration in range(at.iteration, count):
        if at.strikes >= config.guard.patience:
            break
        try:
            if control.between(iteration, count, lambda: _paused(setup, reporter)):
                _show(setup, folder, iteration)
            line = one_iteration(setup, iteration, progress, control)
        except Stopped as stopped:
            if not stopped.is_midway:
                _save(setup, folder, at)
            note = published.update(best_export(folder, at, guard))
            raise Stopped(f"{stopped}{note}") from stopped
        verdict = None if guard is None else guard.look(at, count)
        is_saved = (iteration + 1) % config.run.save_every == 0 or iteration + 1 == count
        is_saved = is_saved or (verdict is not None and verdict.is_kept)
        now = evaluate(setup) if is_saved else None
        at = _finish(setup, folder, at, first, now, line, verdict)
        if now is not None:
            published.update(best_export(folder, at, guard))
            with setup.processes.agreed():
                reporter.update()
        tracker.add(line)
        eta = progress.iteration(line, count)
        place = {"iteration": iteration + 1, "of": count, "eta_seconds": eta}
        note = {}
        if line["frac_advantage_zero"] == 1:
            progress.say(f"iteration {iteration + 1}: {EQUAL}")
            note = {"message": EQUAL}
        folder.status("running", **place, **published.fields, **note)
    tracker.close()
    return _done(setup, at, guard, published, reporter)


@contextmanager
def _paused(setup: Setup, reporter: Reporter) -> Iterator[None]:
    """Write a report before the run waits within it."""
    with resting(setup):
        with suppress(OSError):
            reporter.write()
        yield


def _done(
    setup: Setup, at: Position, guard: Guard | None, published: Published, reporter: Reporter
) -> Result:
    """Report the outcome: at the last iteration, or at the best that the guard has seen."""
    folder = reporter.folder
    chosen, after = best_export(folder, at, guard), at.before
    last = at.best[1] if guard is not None and at.best is not None else at.iteration
    for line in lines_of(folder.metrics_file, "held_out"):
        after = line["held_out"] if line["iteration"] <= last else after
    with setup.processes.agreed():
        check_there(folder)
        message = compared(at.before, after)
        if guard is not None:
            message = f"{folder.guarded().get('said')}; {message}"
        message += _unlearnt(folder, at) + published.update(chosen)
        place = {"iteration": at.iteration, "of": setup.config.run.iterations}
        folder.status("done", **place, message=message)
        reporter.write()
    return Result(at.before, after, chosen, folder.root, at.iteration)


def compared(before: float, after: float) -> str:
    """The held-out prompts' mean rewards before and after, in words; NaN if there are none."""
    if not isfinite(before):
        return "no held-out prompts, so no reward to compare by"
    return f"held-out reward {before:.3f} -> {after:.3f}"


def _unlearnt(folder: JobFolder, at: Position) -> str:
    """A clause on iterations without anything to learn from; empty if there were none."""
    name = "frac_advantage_zero"
    count = sum(line[name] == 1 for line in lines_of(folder.metrics_file, name))
    if not count:
        return ""
    return (
        f"; nothing could be learnt in {count} of {at.iteration} iterations, whose rewards were "
        "equal: take another reward, other prompts or more images of each"
    )


def _save(setup: Setup, folder: JobFolder, at: Position) -> None:
    """Save a checkpoint and an export when the run is stopped."""
    if at.iteration == 0:
        return
    tensors, weights = checkpoint.tensors_of(setup), weights_of(setup)
    with setup.processes.agreed():
        if setup.processes.is_first:
            checkpoint.save(setup, folder, at, tensors)
            export(setup, folder, at.iteration, weights)


def _show(setup: Setup, folder: JobFolder, iteration: int) -> None:
    """Write samples that were asked for."""
    now = evaluate(setup)
    with setup.processes.agreed():
        if setup.processes.is_first:
            keep_samples(folder, iteration, now, setup.held_out)


def _finish(
    setup: Setup,
    folder: JobFolder,
    at: Position,
    first: Evaluated,
    now: Evaluated | None,
    line: dict[str, Any],
    verdict: Verdict | None,
) -> Position:
    """Write the results of an iteration, its checkpoint last.

    A run that ends before that repeats the iteration.
    """
    run, iteration, best = setup.config.run, at.iteration + 1, at.best
    if now is not None and now.scores:
        line["held_out"] = now.mean
        if setup.measures is None and (best is None or now.mean > best[0]):
            best = (now.mean, iteration)
    at = replace(at, iteration=iteration, best=best)
    if verdict is not None:
        line |= verdict.line
        at = replace(at, best=verdict.best, strikes=verdict.strikes)
    is_due = iteration % run.checkpoint_every == 0 or now is not None
    tensors = checkpoint.tensors_of(setup) if is_due else None
    weights = weights_of(setup) if now is not None else None
    with setup.processes.agreed():
        if setup.processes.is_first:
            folder.add_metrics(line)
            if now is not None:
                keep(setup, folder, iteration, first, now, weights)
            if tensors is not None:
                checkpoint.save(setup, folder, at, tensors)
    return at
