"""How a run ends: its result, or the error and what the folder says of it. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RunError, Stopped, UserError
from ..job.folder import WORKING, JobFolder, Onlooker

if TYPE_CHECKING:
    from ..report.refresh import Reporter

LONGEST = 500  # characters of a message


@dataclass(frozen=True, slots=True)
class Result:
    """The results of a run.

    Attributes:
        before: mean reward on the held-out prompts, before training.
        export: the last exported file (with a guard, the best within its bounds), None if the run
            was stopped before its first one.
    """

    before: float
    after: float
    export: Path | None
    folder: Path
    iteration: int


def held_out_change(before: float, after: float) -> str:
    """The held-out prompts' mean rewards before and after, in words; NaN if there are none."""
    if not isfinite(before):
        return "no held-out prompts, so no reward to compare by"
    return f"held-out reward {before:.3f} -> {after:.3f}"


def check_there(folder: JobFolder) -> None:
    """Refuse to write into a folder that is gone: writing would create another of its name."""
    if not isinstance(folder, Onlooker) and not folder.is_used():
        raise RunError(f"the job folder {folder.root} was deleted or moved during the run")


@contextmanager
def unless_deleted(folder: JobFolder) -> Iterator[None]:
    """Blame any error within it on the folder if that was deleted."""
    try:
        yield
    except Exception as error:
        try:
            check_there(folder)
        except RunError as gone:
            raise _with_notes(gone, error) from error
        raise


@contextmanager
def preparing(folder: JobFolder) -> Iterator[None]:
    """Show a worker as loading within it, and report how loading failed.

    What was asked of an earlier worker is forgotten. The folder must be held.
    """
    folder.clear_request()
    folder.status("preparing", **folder.place())
    try:
        yield
    except BaseException as error:
        if folder.read("status.json").get("state") in WORKING:  # else it has been said
            note_end(folder, error)
        raise


@contextmanager
def recorded_end(reporter: Reporter) -> Iterator[None]:
    """Record an error within it in the status and the report; `RunError` if the disk is at fault.

    An onlooker's folder is left alone.
    """
    from safetensors import SafetensorError

    folder = reporter.folder
    try:
        with unless_deleted(folder):
            yield
    except BaseException as error:
        shown, is_of_the_disk = error, isinstance(error, OSError | SafetensorError)
        if is_of_the_disk:
            text = f"the run cannot write: {error}; put that right and resume"
            shown = _with_notes(RunError(text), error)
        if not isinstance(folder, Onlooker):
            note_end(folder, shown)
            with suppress(OSError):
                if folder.is_used():
                    reporter.write()
        if is_of_the_disk:
            raise shown from error
        raise


def note_end(folder: JobFolder, error: BaseException) -> None:
    """Write to the status how a run ended that did not finish."""
    state = "stopped" if isinstance(error, KeyboardInterrupt | Stopped) else "failed"
    text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())[:LONGEST]
    with suppress(OSError):  # the disk may be full; the error itself is what matters
        folder.status(state, **folder.place(), message=line)


def _with_notes(error: RunError, cause: BaseException) -> RunError:
    for note in getattr(cause, "__notes__", ()):
        error.add_note(note)
    return error
