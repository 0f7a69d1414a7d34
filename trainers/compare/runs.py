"""Run the members of a comparison: ordinary training processes, several at a time. No torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..evaluate.comparison import Member
from ..job.files import write_json
from ..job.metrics import last_lines
from ..job.worker import cores
from ..report.progress import clock

POLL_S = 0.2
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Failure:
    """A member that did not finish."""

    member: Member
    why: str

    def __str__(self) -> str:
        return f"{self.member.name}: {self.why} ({self.member.file('log')})"


@dataclass(frozen=True, slots=True)
class Running:
    """A member's process."""

    member: Member
    process: subprocess.Popen[bytes]
    started: float


def run_members(members: Sequence[Member], jobs: int, say: Say) -> list[Failure]:
    """Run what is not finished: start new runs, resume interrupted ones.

    At Ctrl-C or SIGTERM the processes are asked to stop and waited for; a second one kills them.

    Args:
        members: in the order in which they are started.
        jobs: processes at a time, >= 1.
        say: called when a member starts and ends.

    Returns:
        The members that failed; the others run on.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    waiting = [member for member in members if not member.is_finished()]
    done = len(members) - len(waiting)
    if done:
        say(f"{done} of {len(members)} runs are finished already")
    running: list[Running] = []
    failures: list[Failure] = []
    started, ended = time.monotonic(), 0
    with _signals() as noted:
        while waiting or running:
            if noted:
                say(f"stopping {len(running)} runs; the same command goes on with them")
                _stop([run.process for run in running])
                raise KeyboardInterrupt
            while waiting and len(running) < jobs:
                running.append(_start(waiting.pop(0), jobs))
                say(f"[{done + ended}/{len(members)}] {running[-1].member.name} starts")
            time.sleep(POLL_S)
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                ended += 1
                failure = _failure(run)
                failures += [failure] if failure else []
                left = len(waiting) + len(running)
                eta = (time.monotonic() - started) / ended * left
                what = f"failed: {failure.why}" if failure else _came_to(run)
                say(f"[{done + ended}/{len(members)}] {run.member.name} {what}{_eta(eta)}")
    return failures


def command(member: Member) -> list[str]:
    """The command that starts or resumes a run."""
    words = [sys.executable, "-m", "comfyui_pcpo.trainers"]
    if member.folder.is_used():
        return [*words, "resume", str(member.folder.root)]
    return [*words, "train", str(member.file("json")), "--out", str(member.folder.root)]


def _start(member: Member, jobs: int) -> Running:
    write_json(member.file("json"), member.config.model_dump(mode="json"))
    threads = str(max(1, cores() // jobs))
    with member.file("log").open("ab") as log:
        process = subprocess.Popen(
            command(member),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, **os.environ},  # what the user has set comes first
            start_new_session=True,  # Ctrl-C comes from here alone, and once
        )
    return Running(member, process, time.monotonic())


def _failure(run: Running) -> Failure | None:
    if run.process.returncode == 0 and run.member.is_finished():
        return None
    if run.process.returncode == 0:
        return Failure(run.member, "it was stopped before its end")
    last = _last_line(run.member.file("log"))
    return Failure(run.member, f"exit code {run.process.returncode}, {last}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _came_to(run: Running) -> str:
    scores = run.member.folder.scores(0)
    before = sum(score["reward"] for score in scores) / len(scores)
    after = last_lines(run.member.folder.metrics_file, 1)[0]["held_out"]
    seconds = clock(time.monotonic() - run.started)
    return f"held-out reward {before:.3f} -> {after:.3f} in {seconds}"


def _eta(seconds: float) -> str:
    return f"  ETA {clock(seconds)}" if seconds else ""


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in the list within it; a second one interrupts."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
