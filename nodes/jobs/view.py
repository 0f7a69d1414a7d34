"""What is shown of a job: read from its folder, made small, and with numbers that JSON has."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...trainers.job.files import finite
from ...trainers.job.folder import FIRST_SCORES, WORKING, JobFolder
from ...trainers.job.metrics import Digest, Latest, spread
from ...trainers.job.worker import STDERR
from .own_files import is_own

MAX_LINES, MAX_SAMPLES, MAX_LOG = 1000, 100, 50
"""Iterations that are sent for curves, sampled iterations, lines of the log."""
MAX_BYTES = 1 << 18
"""Read of the end of a log."""

ACTIVE = (*WORKING, "pausing", "stopping")
"""States in which a job has its device."""
FILES = (
    "job.json",
    "status.json",
    "control.json",
    "metrics.jsonl",
    "published.json",
    "guard/guard.json",
    FIRST_SCORES,
)
"""What a summary is made of."""

Summary = dict[str, Any]
Sign = tuple[tuple[int, int, int] | None, ...]


def sign_of(files: Sequence[Path]) -> Sign:
    """What changes when one of the files does: time, size and which file it is."""
    signs = []
    for file in files:
        try:
            found = file.stat()
            signs.append((found.st_mtime_ns, found.st_size, found.st_ino))
        except OSError:
            signs.append(None)
    return tuple(signs)


@dataclass
class Known:
    """What one process knows of a job: its summary, made again where its files changed."""

    folder: JobFolder
    _latest: Latest = field(init=False)
    _digest: Digest = field(init=False)
    _digesting: threading.Lock = field(default_factory=threading.Lock)
    _sign: Sign = ()
    _summary: Summary = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._latest = Latest(self.folder.metrics_file, ("reward", "held_out"))
        self._digest = Digest(self.folder.metrics_file, MAX_LINES)

    def summary(self, has_process: bool) -> Summary:
        """The job's name, state and last numbers."""
        sign = sign_of([self.folder.root / name for name in FILES])
        if sign != self._sign or self._summary["state"] in ACTIVE:
            self._summary, self._sign = finite(self._read(has_process)), sign
        return self._summary

    def detail(self, state: str) -> dict[str, Any]:
        """What is shown of the job besides its summary, in that state."""
        with self._digesting:
            return detail_of(self.folder, state, self._digest.update())

    def _read(self, has_process: bool) -> Summary:
        job, now = self.folder.read("job.json"), self.folder.state()
        run, last = job.get("config", {}).get("run", {}), self._latest.values()
        if now["state"] == "lost" and has_process:
            now["state"] = "preparing"  # it is there, but has not come to hold the folder
        if now["state"] == "lost":
            now["message"] = "the worker was killed; resume to go on from its last checkpoint"
        said = [text for text in (now.get("message"), *self.folder.faults()) if text]
        return {
            "id": self.folder.root.name,
            "name": name_of(self.folder),
            "state": now["state"],
            "iteration": now.get("iteration", 0),
            "of": now.get("of", run.get("iterations", 0)),
            "eta_seconds": now.get("eta_seconds"),
            "message": "; ".join(said) or None,
            "created": job.get("created", 0.0),
            "device": job.get("device", "cpu"),
            "publish": run.get("publish"),
            "user": job.get("user"),
            "reward": last.get("reward"),
            "held_out": last.get("held_out"),
            "before": before_of(self.folder),
        }


def detail_of(folder: JobFolder, state: str, digest: Digest) -> dict[str, Any]:
    """What is shown of a job besides its summary.

    Returns:
        Settings, curves and samples, both thinned, exports, log, the folder's name and what the
        guard says, as JSON has them.
    """
    job, sampled = folder.read("job.json"), folder.sampled_folders()
    best = digest.best and digest.best[1]
    shown = spread(sampled, MAX_SAMPLES, lambda place: int(place.name) == best)
    return finite(
        {
            "config": job.get("config"),
            "settings": job.get("settings", {}),
            "metrics": metrics_of(digest),
            "measured": {"count": digest.count, "width": digest.curves.width},
            "samples": samples_of(folder, shown),
            "sampled": len(sampled),
            "exports": [file.name for file in folder.exports().values()],
            "log": log_of(folder, state),
            "folder": str(folder.root),
            "guard": folder.guard_record(),
        }
    )


def name_of(folder: JobFolder) -> str:
    """What a job is called, in one line."""
    return " ".join(folder.read("job.json").get("name", "").split()) or folder.root.name


def tail(file: Path, lines: int) -> list[bytes]:
    """The last lines of a file; none where it cannot be read."""
    if not file.is_file():  # a pipe would be waited for
        return []
    try:
        with file.open("rb") as stream:
            start = max(0, stream.seek(0, 2) - MAX_BYTES)
            stream.seek(start)
            found = stream.read().splitlines()
    except OSError:
        return []
    return (found[1:] if start else found)[-lines:]


def text_of(lines: Sequence[bytes]) -> list[str]:
    """The same as text."""
    return [line.decode("utf-8", "replace") for line in lines]


def last_words(folder: JobFolder, started: bool) -> str | None:
    """Why a worker ended that did not say so in its status.

    Args:
        started: whether it came so far as to write a status.

    Returns:
        The last line of what it wrote to stderr; None where that is no error.
    """
    lines = [line for line in text_of(tail(folder.root / STDERR, MAX_LOG)) if line.strip()]
    is_error = any(line.startswith(("Traceback", "pcpo ")) for line in lines)
    return lines[-1].strip() if lines and (is_error or not started) else None


def log_of(folder: JobFolder, state: str) -> list[str]:
    """The last lines of the log; for a job that failed, with what its process said besides."""
    files = [folder.log, *([folder.root / STDERR] if state in ("failed", "lost") else [])]
    lines = [line for file in files if is_own(folder.root, file) for line in tail(file, MAX_LOG)]
    return text_of(lines)[-MAX_LOG:]


def metrics_of(digest: Digest) -> list[dict[str, Any]]:
    """The run's numbers, thinned; lists in the last line alone."""
    kept = digest.curves.lines
    plain = [{k: v for k, v in line.items() if not isinstance(v, list)} for line in kept[:-1]]
    return [*plain, *kept[-1:]]


def samples_of(folder: JobFolder, places: Sequence[Path]) -> list[dict[str, Any]]:
    """The rewards of sampled iterations, and how many images there are."""
    found = []
    for place in places:
        iteration = int(place.name)
        count = sum(1 for _ in place.glob("*.png"))
        found.append({"iteration": iteration, "scores": folder.scores(iteration), "count": count})
    return found


def before_of(folder: JobFolder) -> float | None:
    """Mean reward of the held-out prompts before training."""
    scores = [entry["reward"] for entry in folder.read_list(FIRST_SCORES)]
    return sum(scores) / len(scores) if scores and None not in scores else None
