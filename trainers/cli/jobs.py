"""`pcpo jobs`: list runs and send them requests. No torch."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..config.arguments import POSITIONAL, Arguments, parse
from ..config.train_config import validate_stored
from ..job.folder import JobError, JobFolder, Request
from ..job.metrics import last_lines
from ..reading import named
from ..report.progress import clock


class JobsArguments(Arguments):
    """List runs, show one, ask something of its worker, or delete it."""

    what: Annotated[Literal["list", "show", "delete", Request], POSITIONAL] = Field(
        description="list all runs in a folder, show one in detail, pause it after this iteration, "
        "continue it after a pause, stop it after this iteration (the command resume continues "
        "it), stop it now without finishing the iteration (stop_now), sample its held-out prompts "
        "after this iteration, or delete it with all it wrote"
    )
    folder: Annotated[str, POSITIONAL] = Field(
        default="runs", description="folder of the run, or of all runs"
    )
    yes: bool = Field(default=False, description="do not ask before a run is deleted")


def main(arguments: list[str]) -> int:
    """List runs, show one, ask something of its worker, or delete it."""
    a = parse(JobsArguments, arguments, "pcpo jobs")
    folder = JobFolder(Path(a.folder))
    if a.what == "list":
        return _list(folder.root)
    if a.what == "show":
        return _show(folder)
    if a.what == "delete":
        return _delete(folder, a.yes)
    folder.ask(a.what)
    print(f"{folder.root}: asked to {a.what}; it answers within one iteration")
    return 0


def _list(root: Path) -> int:
    """Print one line per run."""
    if not os.path.isdir(root):
        raise JobError(f"there is no folder {named(root)}; give the one that holds the runs")
    folders = sorted(path for path in root.iterdir() if JobFolder(path).is_used())
    if not folders:
        print(f"no run in {root}")
    for path in folders:
        print(f"{path.name:32} {_line(JobFolder(path))}")
    return 0


def _line(folder: JobFolder) -> str:
    now = folder.state()
    text = f"{now['state']:10} {now.get('iteration', 0):>5}/{now.get('of', '?'):<5}"
    if now["state"] == "running" and now.get("eta_seconds") is not None:
        text += f" ETA {clock(now['eta_seconds'])}"
    said = "; ".join(text for text in (now.get("message"), *folder.faults()) if text)
    return f"{text} {' '.join(said.split())}".rstrip()


def _show(folder: JobFolder) -> int:
    config = validate_stored(folder.job()["config"], str(folder.root / "job.json"))
    method = config.method
    print(f"{folder.root}\n{_line(folder)}")
    print(f"model    {config.model.source}")
    print(f"method   {method.credit} credit, {method.ratio}, {method.objective}")
    print(f"rewards  {', '.join(config.rewards)}")
    for line in last_lines(folder.metrics_file, 5):
        held_out = f"  held out {line['held_out']:.3f}" if "held_out" in line else ""
        print(f"{line['iteration']:>8} reward {line.get('reward', math.nan):.3f}{held_out}")
    for file in [*folder.exports().values()][-3:]:
        print(f"export   {file}")
    page = folder.report / "report.html"
    if page.is_file():
        print(f"report   {page}")
    return 0


def _delete(folder: JobFolder, is_sure: bool) -> int:
    folder.check_run()
    if not is_sure and input(f"delete {folder.root} and all in it? [y/N] ").lower() != "y":
        print("nothing was deleted")
        return 0
    folder.delete()
    print(f"{folder.root} is deleted")
    return 0
