"""The training loop, from top to bottom.

for each iteration:
    sample images with the present policy        (sampling.py, pcpo.rollout)
    score them                                   (pcpo.rewards)
    compare them with each other                 (pcpo.advantages)
    move the policy towards the better ones      (update.py, pcpo.objectives)
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import checkpoint
from .checkpoint import Position
from .config import TrainConfig, validate
from .control import Control, RunError, Stopped
from .errors import UserError
from .evaluate import Evaluated, evaluate, first_evaluation, keep, keep_samples, last_export
from .families.source import fingerprint
from .iteration import one_iteration
from .job import JobError, JobFolder
from .preflight import check_folder, model_source
from .prepare import Setup, prepare
from .progress import Progress
from .report_page import write_page
from .tracker import Tracker


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to.

    Attributes:
        before: mean reward on the held-out prompts, before training.
        after: the same after it.
        export: the last exported file, None where the run was stopped before its first one.
        folder: where everything is.
        iteration: finished iterations.
    """

    before: float
    after: float
    export: Path | None
    folder: Path
    iteration: int


def train(config: TrainConfig, root: Path, progress: Progress | None = None) -> Result:
    """Run a config to its end.

    Args:
        config: the run.
        root: where it writes; must not hold a run already.
        progress: shown what happens; silent where None.

    Returns:
        The rewards before and after, and the exported file; `ConfigError` where the folder holds a
        run (`check_folder`) or the config cannot be run (`prepare`).
    """
    progress = progress or Progress.silent()
    folder = JobFolder(root)
    check_folder(root)
    setup = prepare(config, progress.say)
    inputs = {"model": fingerprint(model_source(config.model.source))}
    job = {"config": config.model_dump(mode="json"), "inputs": inputs}
    folder.start(job | {"versions": checkpoint.machine()})
    with folder.held():
        for note in setup.notes:
            progress.say(note)
        return _run(setup, folder, progress, Position())


def resume(root: Path, progress: Progress | None = None, iterations: int | None = None) -> Result:
    """Go on with a run from its last good checkpoint, to the same bytes.

    Args:
        root: the job folder.
        progress: shown what happens; silent where None.
        iterations: a new number of iterations in all; the run's own where None.

    Returns:
        As `train`.

    Raises:
        JobError: where there is no run, another process works in it, its model changed, or no
            checkpoint is whole (see `checkpoint.newest`).
    """
    progress = progress or Progress.silent()
    folder = JobFolder(root)
    job = folder.job()
    config = validate(job["config"], str(root / "job.json"))
    with folder.held():
        if iterations is not None:
            config = validate(
                {**job["config"], "run": {**job["config"]["run"], "iterations": iterations}},
                "--iterations",
            )
            job["config"] = config.model_dump(mode="json")
        found, notes = checkpoint.newest(folder, config)
        if fingerprint(model_source(config.model.source)) != job["inputs"]["model"]:
            raise JobError(
                f"the model {config.model.source} is not the one that {root} was started with; "
                "put it back, or start a new run"
            )
        setup = prepare(config, progress.say)
        at = Position()
        if found is not None:
            at, differences = checkpoint.load(setup, found)
            notes += differences
        for note in [*setup.notes, *notes]:
            progress.say(note)
        progress.say(f"going on after iteration {at.iteration}")
        folder.start(job)
        folder.cut_metrics(at.iteration)
        folder.answered()
        return _run(setup, folder, progress, at)


def _run(setup: Setup, folder: JobFolder, progress: Progress, at: Position) -> Result:
    """The loop, and what its ways to end mean for the folder.

    Raises:
        RunError: where the folder can no longer be written to.
    """
    control = Control(folder)
    try:
        with progress.logging(folder.log), control.signals():
            return _train(setup, folder, progress, control, at)
    except BaseException as error:
        state = "stopped" if isinstance(error, KeyboardInterrupt | Stopped) else "failed"
        last = folder.read("status.json")
        place = {name: last[name] for name in ("iteration", "of") if name in last}
        _note_end(folder, state, place, error)
        if isinstance(error, OSError) and not folder.is_used():
            gone = f"the job folder {folder.root} was deleted or moved during the run"
            raise RunError(gone) from error
        if isinstance(error, OSError):
            raise RunError(f"the run cannot write: {error}; put that right and resume") from error
        raise


def _note_end(folder: JobFolder, state: str, place: dict[str, int], error: BaseException) -> None:
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    with suppress(OSError):  # the disk may be full; the error itself is what matters
        folder.status(state, **place, message=text)
        if folder.is_used():
            write_page(folder)


def _train(
    setup: Setup, folder: JobFolder, progress: Progress, control: Control, at: Position
) -> Result:
    config, count = setup.config, setup.config.run.iterations
    folder.status("running", iteration=at.iteration, of=count)
    first = first_evaluation(setup, folder, progress, at)
    if at.iteration == 0:
        at = replace(at, before=first.mean)
    tracker = Tracker.of(config, folder, at.iteration)
    for iteration in range(at.iteration, count):
        try:
            if control.between(iteration, count):
                keep_samples(folder, iteration, evaluate(setup), setup.held_out)
            line = one_iteration(setup, iteration, progress, control)
        except Stopped:
            if iteration > 0 and setup.accelerator.is_main_process:
                checkpoint.save(setup, folder, at)
            raise
        now = None
        if (iteration + 1) % config.run.save_every == 0 or iteration + 1 == count:
            now = evaluate(setup)
        at = _finish(setup, folder, at, first, now, line)
        tracker.add(line)
        eta = progress.iteration(line, count)
        folder.status("running", iteration=iteration + 1, of=count, eta_seconds=eta)
    tracker.close()
    after = next((m["held_out"] for m in reversed(folder.metrics()) if "held_out" in m), at.before)
    message = f"held-out reward {at.before:.3f} -> {after:.3f}"
    folder.status("done", iteration=count, of=count, message=message)
    write_page(folder)
    return Result(at.before, after, last_export(folder), folder.root, at.iteration)


def _finish(
    setup: Setup,
    folder: JobFolder,
    at: Position,
    first: Evaluated,
    now: Evaluated | None,
    line: dict[str, Any],
) -> Position:
    """Write what an iteration came to, its checkpoint last: a run that ends before it makes the
    iteration again."""
    run, iteration, best = setup.config.run, at.iteration + 1, at.best
    if now is not None and now.scores:
        line["held_out"] = now.mean
        if best is None or now.mean > best[0]:
            best = (now.mean, iteration)
    at = replace(at, iteration=iteration, best=best)
    if setup.accelerator.is_main_process:
        folder.add_metrics(line)
        if now is not None:
            keep(setup, folder, iteration, first, now)
        if iteration % run.checkpoint_every == 0 or now is not None:
            checkpoint.save(setup, folder, at)
    return at
