"""The start of a run: a new one, or one that goes on from its last checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.train_config import TrainConfig, validate_stored
from ..distributed.launcher import folder_of, is_first
from ..errors import RunError
from ..families.source import fingerprint
from ..job.folder import JobError, JobFolder
from ..job.inputs import check_inputs, inputs_of, keep_prompts, kept_prompts
from ..job.preflight import check_folder, model_source
from ..job.prompts import PromptSplit, split_prompts
from ..report.progress import Progress
from . import checkpoint
from .checkpoint import Position
from .endings import Result, check_there, unless_deleted
from .loop import run
from .publish import check_publish
from .setup import Setup, prepare
from .tastes import used_heads


def train(config: TrainConfig, root: Path, progress: Progress | None = None) -> Result:
    """Run a config to its end.

    `ConfigError` if the folder holds a run (`check_folder`) or the config cannot be run
    (`check_publish`, `prepare`).

    Args:
        root: where it writes; must not hold a run already.
        progress: shows what happens; silent if None.

    Raises:
        RunError: if the folder was deleted while the model was loaded.
    """
    progress = progress or Progress.silent()
    folder = folder_of(root)
    with folder.hold():
        if is_first():
            check_folder(root)
            check_publish(config)
        setup = prepare(config, progress.say)
        inputs = {"model": fingerprint(model_source(config.model.source))}
        inputs |= {"rewards": _fingerprints(setup)}
        split = PromptSplit(setup.prompts, setup.held_out)
        inputs |= inputs_of(config, split)
        job = {"config": config.model_dump(mode="json"), "inputs": inputs}
        with setup.processes.in_agreement():
            if not root.is_dir():
                raise RunError(f"the job folder {root} was deleted while the model was loaded")
            keep_prompts(folder, split)
            folder.start(job | {"versions": checkpoint.machine()})
        return run(setup, folder, progress, Position())


def resume(root: Path, progress: Progress | None = None, iterations: int | None = None) -> Result:
    """Resume a run from its last good checkpoint, to the same bytes.

    `JobError` if another process works in the folder, and as `go_on`.

    Args:
        progress: shows what happens; silent if None.
        iterations: a new number of iterations in all; the run's own if None.
    """
    folder = folder_of(root)
    folder.job()
    with folder.hold():
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
        setup, at = _restore(folder, progress, iterations)
    return run(setup, folder, progress, at, server)


def _restore(
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
    done, before = (int(newest.name), checkpoint.heads_of(newest)) if newest else (0, None)
    heads = used_heads(folder, done, before)
    setup = prepare(config, progress.say, split, heads)
    notes += _check_rewards(setup, job["inputs"], root)
    at, newest = Position(), setup.processes.decide(lambda: newest)
    with setup.processes.in_agreement():
        if newest is not None:
            at, differences = checkpoint.load(setup, newest)
            notes += differences
    for note in notes:
        progress.say(note)
    progress.say(f"going on after iteration {at.iteration}")
    job.setdefault("versions", checkpoint.machine())
    with setup.processes.in_agreement():
        check_there(folder)
        if kept is None:
            keep_prompts(folder, split)
        folder.start(job)
        folder.cut_metrics(at.iteration)
    return setup, at


def _fingerprints(setup: Setup) -> dict[str, dict[str, Any]]:
    """What the numbers of each reward depend on, including the guard's."""
    return setup.reward_set.fingerprints() | (
        setup.measures.fingerprints() if setup.measures else {}
    )


def _check_rewards(setup: Setup, inputs: dict[str, Any], root: Path) -> list[str]:
    """Refuse to resume with other rewards than before; note it if only their versions differ."""
    notes, now = [], _fingerprints(setup)
    for label, before in inputs.setdefault("rewards", now).items():
        same, other = (
            {k: v for k, v in f.items() if k not in ("versions", "head")}
            for f in (before, now[label])
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
