"""Which job a node is about, and which of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ...trainers.job.folder import JobError, JobFolder
from ...trainers.job.metrics import is_number, lines_of
from ..errors import NodeError
from ..jobs.access import Jobs
from ..jobs.of_comfyui import registry
from ..jobs.view import name_of
from . import sockets

NEWEST = "newest job"
"""The choice of no job in particular."""

LATEST, BEST, NUMBERED = "latest", "best", "iteration"
WHICH = (LATEST, BEST, NUMBERED)


def job_inputs() -> list[Any]:
    """The choice of a job, and the socket that overrides it."""
    return [
        io.Combo.Input(
            "job",
            options=[NEWEST, *dict.fromkeys(job["name"] for job in _all_jobs())],
            default=NEWEST,
            tooltip="The job, by name. If a new job is not in the list, press R.",
        ),
        sockets.Job.Input(
            "from_job",
            optional=True,
            tooltip="The job of PCPO Train in Background. It overrides the choice by name.",
        ),
    ]


def _all_jobs() -> list[dict[str, Any]]:
    try:
        return registry().jobs()
    except ImportError:  # outside ComfyUI
        return []


def which_inputs() -> list[Any]:
    """The choice of an exported LoRA."""
    return [
        io.Combo.Input(
            "which",
            options=list(WHICH),
            default=LATEST,
            tooltip="latest: the newest LoRA. best: the LoRA with the highest reward on the "
            "held-out prompts, within the guard's bounds if the guard is on. iteration: the LoRA "
            "of the iteration below.",
        ),
        io.Int.Input(
            "iteration",
            default=1,
            min=1,
            max=10**6,
            tooltip="The iteration whose LoRA to load, if 'iteration' is chosen. Training saves a "
            "LoRA every run_save_every iterations.",
        ),
    ]


def chosen_id(jobs: Jobs, name: str, from_job: Mapping[str, Any] | None = None) -> str:
    """The id of the job that a node is about.

    Args:
        name: the widget's: a name, an id, or `NEWEST`.
    """
    if from_job is not None:
        name = from_job["id"]
    there = jobs.jobs()
    if name == NEWEST and there:
        return there[0]["id"]
    for key in ("id", "name"):
        for job in there:
            if job[key] == name:
                return job["id"]
    if name == NEWEST:
        raise NodeError("there is no job yet; start one with PCPO Train in Background")
    raise NodeError(f"there is no job {name!r} any more; press R and choose another")


def sign_of(jobs: Jobs, name: str | None) -> str:
    """Changes when a job has moved on, or any job where none is named.

    Args:
        name: the widget's; None where a socket is connected, whose job is not known yet.
    """
    there = jobs.jobs()
    if name == NEWEST:
        there = there[:1]
    elif name is not None:
        there = [job for job in there if name in (job["id"], job["name"])]
    about = [
        (job["id"], job["state"], job["iteration"], len(jobs.folder(job["id"]).exports()))
        for job in there
    ]
    return repr(about)


def folder_of(jobs: Jobs, id: str) -> JobFolder:
    """A job's folder."""
    try:
        return jobs.folder(id)
    except JobError as error:
        raise NodeError(str(error)) from error


def export_of(folder: JobFolder, which: str, iteration: int) -> Path:
    """A LoRA that a job has exported.

    Args:
        which: one of `WHICH`.
        iteration: for `NUMBERED`.
    """
    there = folder.exports()
    name = name_of(folder)
    if not there:
        now = folder.state()
        done = f"{now['state']}, iteration {now.get('iteration', 0)}"
        raise NodeError(f"the job {name!r} ({done}) has no LoRA yet; queue again when it has")
    wanted = iteration if which == NUMBERED else max(there)
    if which == BEST:
        wanted = _best(folder, there)
    if wanted not in there:
        shown = ", ".join(map(str, sorted(there)[-12:]))
        raise NodeError(f"the job {name!r} has no LoRA of iteration {wanted}; it has {shown}")
    return there[wanted]


def _best(folder: JobFolder, there: Mapping[int, Path]) -> int:
    """The exported iteration that the guard says is best, or the one of the highest held-out
    reward; the latest where none was measured."""
    guarded = folder.guard_record().get("best")
    if isinstance(guarded, int) and guarded in there:
        return guarded
    measured = lines_of(folder.metrics_file, "held_out")
    scores = {
        line["iteration"]: line["held_out"]
        for line in measured
        if line["iteration"] in there and is_number(line["held_out"])
    }
    return max(scores, key=lambda iteration: scores[iteration]) if scores else max(there)
