"""The folder of a run: the interface between a worker and its observers. No torch.

job.json        config, inputs and versions
status.json     state, iteration, of, ETA, message; replaced in one step
control.json    requests to the worker: pause, stop, stop_now, sample
metrics.jsonl   one line per iteration
worker.log      the worker's messages
stderr.log      the rest of its process's output, if ComfyUI started it
published.json  the LoRA file outside the folder that this run keeps up to date
taste/          the heads of tastes that scored, and when
guard/          the base's images that the guard compares with, and guard.json
samples/ITER/   *.png and scores.json; 00000 is the model before training
checkpoints/    what a run resumes from
lora/           *.safetensors, loadable anywhere
report/         report.html, plots and the comparison before and after
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...remedies import command
from ..errors import UserError
from ..reading import named
from . import metrics
from .contents import Unreadable, read_json
from .files import json_text, write_json
from .leftovers import sweep
from .locks import hold, is_taken

Request = Literal["pause", "continue", "stop", "stop_now", "sample"]
WORKING = ("preparing", "running", "paused")
OWN = ("status.json", "job.lock", "metrics.jsonl", "checkpoints")
"""Files besides job.json that distinguish a run's folder from another program's."""
EXPORT = re.compile(r"pcpo_([0-9]+)\.safetensors")
FIRST_SCORES = "samples/00000/scores.json"
PATIENCE_S = 1.0
"""How long to wait for a folder that another process may only be reading."""


class JobError(UserError, RuntimeError):
    """A job folder that cannot be used as asked."""


@dataclass(frozen=True, slots=True)
class JobFolder:
    """Where a run writes.

    Attributes:
        root: the folder; created when a run starts.
    """

    root: Path

    @property
    def samples(self) -> Path:
        """Sampled images, one folder per iteration."""
        return self.root / "samples"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, one folder per iteration."""
        return self.root / "checkpoints"

    @property
    def lora(self) -> Path:
        """Exports that other programs load."""
        return self.root / "lora"

    @property
    def report(self) -> Path:
        """Plots and comparisons."""
        return self.root / "report"

    @property
    def guard(self) -> Path:
        """The guard's base images and record."""
        return self.root / "guard"

    @property
    def taste(self) -> Path:
        """Heads of the tastes among its rewards."""
        return self.root / "taste"

    @property
    def log(self) -> Path:
        return self.root / "worker.log"

    # --- the run ---------------------------------------------------------------------------------

    def is_used(self) -> bool:
        """Whether a run was started here, even if its job.json cannot be read."""
        try:
            (self.root / "job.json").lstat()
        except (OSError, ValueError) as error:  # ValueError: no path at all
            return isinstance(error, PermissionError)
        return True

    def start(self, job: Mapping[str, Any]) -> None:
        """Write "config", "inputs" and "versions" of a new run.

        Raises:
            JobError: if the folder cannot be written to.
        """
        try:
            write_json(self.root / "job.json", dict(job))
        except OSError as error:
            why = f"{self.root} cannot be written to ({error.strerror})"
            raise JobError(f"{why}; choose another folder with --out") from error

    def job(self) -> dict[str, Any]:
        """ "config", "inputs" and "versions" of the run.

        Raises:
            JobError: if there is no run, or its file cannot be read.
        """
        try:
            job = read_json(self.root / "job.json")
        except Unreadable as error:
            raise JobError(f"{error}; restore it, or start a new run") from error
        if job is None:
            raise JobError(f"{named(self.root)} holds no run: there is no job.json in it")
        return job

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the folder for this process (`locks.hold`); `JobError` if another one does."""
        with hold(self.root, "job.lock", self._in_use, PATIENCE_S):
            yield

    def _in_use(self, why: str) -> JobError:
        if why:
            return JobError(f"{self.root} cannot be worked in ({why}); choose another folder")
        pid = self.read("status.json").get("pid", "unknown")
        return JobError(
            f"{self.root} is in use by process {pid}; wait for it, stop it with "
            f"{command('jobs', 'stop', self.root)}, or choose another folder"
        )

    def is_held(self) -> bool:
        """Whether a process works in the folder."""
        return is_taken(self.root / "job.lock")

    def check_run(self) -> None:
        """Refuse a folder that is not a run's; an unreadable run passes."""
        try:
            self.job()
        except JobError as error:
            if not self.is_used() or not any((self.root / name).exists() for name in OWN):
                raise JobError(f"{named(self.root)} holds no run: {error}") from error

    def delete(self) -> None:
        """Remove the run and all it wrote, completely or not at all.

        Raises:
            JobError: if the folder is no run's, or a process works in it.
        """
        self.check_run()
        if self.is_held():
            stop = command("jobs", "stop", self.root)
            raise JobError(f"{self.root} is being worked in; stop it first with {stop}")
        publish = self.read("job.json").get("config", {}).get("run", {}).get("publish")
        root = Path(os.path.abspath(self.root))  # "." has no name
        doomed = root.with_name(f".{root.name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        try:
            root.rename(doomed)  # on Windows not while one of its files is open
        except OSError as error:
            raise JobError(f"{self.root} cannot be deleted ({error}); close its files") from error
        shutil.rmtree(doomed, ignore_errors=True)
        if publish is not None:  # a copy that was cut off by a kill
            sweep(Path(publish).parent, Path(publish).name, is_deep=False)

    # --- how far it is ---------------------------------------------------------------------------

    def status(self, state: str, **fields: Any) -> None:
        """Write the run's progress; does nothing if the folder was deleted.

        Args:
            state: "queued", "preparing", "running", "paused", "done", "stopped" or "failed".
            fields: iteration, of, eta_seconds, message and the like.
        """
        if self.root.is_dir():
            now = {"state": state, "heartbeat": time.time(), "pid": os.getpid()}
            write_json(self.root / "status.json", {**now, **fields})

    def place(self) -> dict[str, int]:
        """The numbers of finished and of all iterations, as far as the status says."""
        last = self.read("status.json")
        return {name: last[name] for name in ("iteration", "of") if name in last}

    def state(self) -> dict[str, Any]:
        """The status, including states inferred from the folder.

        These are "pausing", "stopping", "lost" if the worker is gone though it should be there, and
        "unreadable" with a message.
        """
        try:
            read_json(self.root / "job.json")
            status = {"state": "queued", **(read_json(self.root / "status.json") or {})}
        except Unreadable as error:
            return {"state": "unreadable", "message": str(error)}
        if status["state"] in WORKING:
            if not self.is_held():
                return status | {"state": "lost"}
            asked = self.request()
            ahead = {"pause": "pausing", "stop": "stopping", "stop_now": "stopping"}
            if asked in ahead and (asked, status["state"]) != ("pause", "paused"):
                status["state"] = ahead[asked]
        return status

    def ask(self, request: Request) -> None:
        """Send a request to the worker, which answers within one iteration, to "stop_now" in it.

        Raises:
            JobError: if there is no worker.
        """
        self.job()
        if not self.is_held():
            start = command("resume", self.root)
            raise JobError(f"{self.root} has no worker at present; start it with {start}")
        write_json(self.root / "control.json", {"request": request})

    def request(self) -> str | None:
        """The last request."""
        return self.read("control.json").get("request")

    def clear_request(self) -> None:
        """Delete the last request."""
        (self.root / "control.json").unlink(missing_ok=True)

    # --- what it wrote ---------------------------------------------------------------------------

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one iteration's numbers."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json_text(dict(line)) + "\n")

    @property
    def metrics_file(self) -> Path:
        """One line per iteration; `metrics` reads it."""
        return self.root / "metrics.jsonl"

    def metrics(self) -> list[dict[str, Any]]:
        """All iterations' numbers; malformed lines are skipped."""
        return [*metrics.lines_of(self.metrics_file)]

    def cut_metrics(self, iteration: int) -> None:
        """Drop the lines after an iteration, which will be run again."""
        metrics.cut_after(self.metrics_file, iteration)

    def sampled_folders(self) -> list[Path]:
        """The folders of sampled iterations, in order."""
        try:
            names = [name for name in os.listdir(self.samples) if re.fullmatch("[0-9]+", name)]
        except OSError:
            return []
        return [self.samples / name for name in sorted(names, key=int)]

    def scores(self, iteration: int) -> list[Any]:
        """The held-out scores of a sampled iteration; empty if they cannot be read."""
        return self.read_list(f"samples/{iteration:05}/scores.json")

    def export(self, iteration: int) -> Path:
        """The file that an iteration's weights are exported to."""
        return self.lora / f"pcpo_{iteration:05}.safetensors"

    def exports(self) -> dict[int, Path]:
        """The exported files by iteration, the newest last."""
        files = self.lora.glob("pcpo_*.safetensors") if self.lora.is_dir() else ()
        named = ((EXPORT.fullmatch(file.name), file) for file in files if file.is_file())
        return dict(sorted((int(match[1]), file) for match, file in named if match))

    def last_export(self) -> Path | None:
        """The newest exported file."""
        return next(reversed(self.exports().values()), None)

    def faults(self) -> list[str]:
        """Unreadable files that a run can do without, one sentence each."""
        faults = []
        for name in ("control.json", "guard/guard.json", "published.json", FIRST_SCORES):
            try:
                read_json(self.root / name)
            except Unreadable as error:
                faults.append(str(error))
        return faults

    def guard_record(self) -> dict[str, Any]:
        """The guard's record: its rule, the last measurement, the best iteration; empty without
        one.
        """
        return self.read("guard/guard.json")

    def read(self, name: str) -> dict[str, Any]:
        """The contents of a JSON file; empty if it cannot be read."""
        contents = self._read(name)
        return contents if isinstance(contents, dict) else {}

    def read_list(self, name: str) -> list[Any]:
        """The same for a file that holds a list."""
        contents = self._read(name)
        return contents if isinstance(contents, list) else []

    def _read(self, name: str) -> Any:
        try:
            return read_json(self.root / name)
        except Unreadable:
            return None


class Onlooker(JobFolder):
    """The folder of a run for its other processes: they read, the first one writes."""

    __slots__ = ()

    def start(self, job: Mapping[str, Any]) -> None:
        """Left to the first process."""

    @contextmanager
    def hold(self) -> Iterator[None]:
        yield

    def status(self, state: str, **fields: Any) -> None:
        """Left to the first process."""

    def clear_request(self) -> None:
        """Left to the first process."""

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Left to the first process."""

    def cut_metrics(self, iteration: int) -> None:
        """Left to the first process."""
