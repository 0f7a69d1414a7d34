"""The jobs of this ComfyUI: a queue for each device, and a worker process for each that runs.

All that must outlive ComfyUI is in the job folders; a registry is what one process knows of them.
Where several share a folder, the one that holds `server.lock` starts workers, the others look on.
No torch.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...trainers.config.train_config import TrainConfig
from ...trainers.job.folder import JobError, JobFolder, Request
from ...trainers.job.worker import BUSY_LOCK, SERVER_LOCK, start
from .. import names
from .view import ACTIVE, Known, Summary, last_words

log = logging.getLogger(__name__)

ID = re.compile(r"[0-9a-f]{16}")
TICK_S = 0.5
"""Between two looks at the jobs, and so between two messages."""
LAST_S = 20.0
"""For a worker that is done to end."""
RESUMABLE = ("stopped", "failed", "lost", "unreadable")

Launch = Callable[..., "subprocess.Popen[bytes]"]


class UnknownJob(JobError):
    """There is no job of an id."""

    def __init__(self, id: str) -> None:
        super().__init__(f"there is no job {id[:40]!r}; it may have been deleted")


class JobRegistry:
    """The jobs of a folder; safe to use from any thread.

    Args:
        root: the folder; made when the first job is.
        launch: starts a worker on a job's folder, as `trainers.job.worker.start`.
        notify: told all summaries when one changed, at most twice a second.
    """

    def __init__(
        self,
        root: Path,
        launch: Launch = start,
        notify: Callable[[list[Summary]], None] | None = None,
        is_busy: Callable[[], bool] | None = None,
    ) -> None:
        self.root = root
        self._launch, self._notify, self._is_busy = launch, notify, is_busy
        self._lock = threading.RLock()
        self._known: dict[str, Known] = {}
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._said: list[Summary] = []
        self._num_waiting = 0
        self._fault = ""
        self._at = 0

    # --- what there is ---------------------------------------------------------------------------

    def jobs(self) -> list[Summary]:
        """All jobs, the newest first."""
        with self._lock:
            found = [self._summary(id) for id in self._ids()]
            return sorted(found, key=lambda job: job["created"], reverse=True)

    def job(self, id: str) -> dict[str, Any]:
        """A job with its settings, curves, samples, exports and log; `UnknownJob`."""
        now = self.answer(id)
        with self._lock:
            known = self._known.setdefault(id, Known(JobFolder(self.root / id)))
        return now["job"] | known.detail(now["job"]["state"]) | {"at": now["at"]}

    def summary(self, id: str) -> Summary:
        """A job's name, state and last numbers; `UnknownJob`."""
        self.folder(id)
        with self._lock:
            return self._summary(id)

    def answer(self, id: str | None = None) -> dict[str, Any]:
        """All "jobs", or one "job", and "at": of two answers that of the larger was made later."""
        with self._lock:
            found = {"jobs": self.jobs()} if id is None else {"job": self.summary(id)}
            return {**found, "at": self.stamp()}

    def stamp(self) -> int:
        """A number above all before it, also those of an earlier process."""
        with self._lock:
            self._at = max(self._at + 1, time.time_ns() // 1000)
            return self._at

    def folder(self, id: str) -> JobFolder:
        """A job's folder."""
        if not ID.fullmatch(id) or not JobFolder(self.root / id).is_used():
            raise UnknownJob(id)
        return JobFolder(self.root / id)

    # --- what is done ----------------------------------------------------------------------------

    def create(
        self,
        config: TrainConfig,
        name: str,
        device: str,
        settings: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        id: str | None = None,
        user: str | None = None,
    ) -> str:
        """Put a job into the queue of its device; it starts at once where that is free.

        Args:
            device: "cpu", "cuda:0": what this process calls it.
            settings: "on_server_exit": "continue" or "save_and_stop"; "pause_while_busy".
            inputs: what it was made from; the model's fingerprint is added by the worker.
            id: of 16 hexadecimal digits, where its folder holds inputs already; else it is drawn.
            user: whose it is, where ComfyUI keeps its users apart.
        """
        target = config.run.publish
        with self._lock:
            if target is not None and self._is_taken(Path(target)):
                raise JobError(f"{target} exists or belongs to another job; choose another name")
            is_new, id = id is None, id or secrets.token_hex(8)
            folder = JobFolder(self.root / id)
            if folder.is_used() or not ID.fullmatch(id):
                raise JobError(f"{id!r} is not a valid id for a new job; leave it out to get one")
            about = {"name": name, "created": time.time(), "device": device, "user": user}
            job = about | {"settings": dict(settings or {}), "inputs": dict(inputs or {})}
            try:
                folder.root.mkdir(parents=True, exist_ok=not is_new)
                folder.start({"config": config.model_dump(mode="json"), **job})
                folder.status("queued")
            except (OSError, JobError) as error:
                if is_new:
                    shutil.rmtree(folder.root, ignore_errors=True)
                why = f"{self.root} cannot be written to ({error.__cause__ or error})"
                raise JobError(f"{why}; no job was made") from error
            self.wake()
        return id

    def _is_taken(self, file: Path) -> bool:
        """Whether a LoRA file exists, or is to be a job's."""
        wanted = {_normal(job["publish"]) for job in self.jobs() if job["publish"]}
        return file.exists() or _normal(file) in wanted

    def free_name(self, folder: Path, name: str) -> str:
        """A name whose LoRA file would be no one else's: NAME, NAME-2, NAME-3 ...

        Args:
            folder: where the file is to be, of models/loras.
        """
        return names.free_name(name, lambda found: self._is_taken(names.lora_file(folder, found)))

    def ask(self, id: str, request: Request) -> None:
        """Ask something of a job's worker; it answers within one iteration."""
        with self._lock:
            folder, now = self.folder(id), self.summary(id)
            state, name, what = now["state"], now["name"], request.replace("_", " ")
            if state == "queued" and request == "stop":
                folder.status("stopped", **folder.place(), message="taken out of the queue")
                return
            if state == "queued":
                raise JobError(f"{name} is queued and cannot {what} yet; it can be stopped")
            if state not in ACTIVE:
                raise JobError(f"{name} is {state} and cannot {what}; resume it first")
            if (request, state) in (("pause", "stopping"), ("sample", "stopping")):
                raise JobError(f"{name} is stopping; wait until it has, then resume it")
            if request == "sample" and state != "running":
                raise JobError(f"{name} is {state}; samples are made while it runs")
            if not folder.is_held():
                raise JobError(f"{name} is about to start; ask again in a moment")
            folder.ask(request)

    def resume(self, id: str) -> None:
        """Put a job that ended early back into the queue."""
        with self._lock:
            folder, now = self.folder(id), self.summary(id)
            if now["state"] not in RESUMABLE:
                raise JobError(f"{now['name']} is {now['state']}; there is nothing to resume")
            folder.job()  # or one sentence on why it cannot be read
            folder.status("queued", **folder.place())
            self.wake()

    def delete(self, id: str) -> None:
        """Remove a job and all in its folder; its file in models/loras stays.

        A worker that has said its last word is given a few seconds to end.
        """
        end = time.monotonic() + LAST_S
        while self._is_ending(id) and time.monotonic() < end:
            time.sleep(0.1)
        with self._lock:
            folder, now = self.folder(id), self.summary(id)
            if now["state"] in ACTIVE:
                raise JobError(f"{now['name']} is {now['state']}; stop it first, then delete it")
            if self._is_ending(id):
                raise JobError(f"{now['name']} is about to end; delete it in a moment")
            folder.delete()
            self._known.pop(id, None)
            self.wake()

    def _is_ending(self, id: str) -> bool:
        """Whether a job is over and its process is still there, this one's or another's."""
        with self._lock:
            folder, now = self.folder(id), self.summary(id)
            has_process = id in self._workers or folder.is_held()
            return has_process and now["state"] not in ACTIVE

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """Within it ComfyUI's queue does not count as busy, for it waits for a job itself."""
        with self._lock:
            self._num_waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_waiting -= 1

    # --- the thread ------------------------------------------------------------------------------

    def wake(self) -> None:
        """Look after the jobs for as long as one is queued or at work."""
        with self._lock:
            if self._thread is None and not self._closing.is_set() and self.root.is_dir():
                self._thread = threading.Thread(target=self._watch, name="pcpo-jobs", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Look after them no longer; workers go on."""
        self._closing.set()
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _watch(self) -> None:
        leads, busy = FileLock(self.root / SERVER_LOCK), FileLock(self.root / BUSY_LOCK)
        for left in self.root.glob(".*.deleted"):  # by a delete that was cut off
            if ID.fullmatch(left.name[1:-8]):
                shutil.rmtree(left, ignore_errors=True)
        try:
            while not self._closing.is_set():
                with self._lock:
                    if not self._look(leads, busy):
                        self._thread = None  # whoever adds a job from here on starts another
                        return
                self._closing.wait(TICK_S)
        finally:
            busy.release(force=True)
            leads.release(force=True)

    def _look(self, leads: FileLock, busy: FileLock) -> bool:
        """One look; whether there is more to come."""
        try:
            jobs = self._tick(leads, busy)
        except Exception as error:  # a full disk, a file that is being replaced: look again
            self._complain(error)
            return True
        is_at_work = any(job["state"] in ("queued", *ACTIVE) for job in jobs)
        return is_at_work or bool(self._workers)  # a process ends a moment after its job

    def _complain(self, error: Exception) -> None:
        """Log an error, once for as long as it stays the same."""
        if repr(error) != self._fault:
            log.error("PCPO cannot look after its jobs", exc_info=error)
        self._fault = repr(error)

    def _tick(self, leads: FileLock, busy: FileLock) -> list[Summary]:
        """One look: start what can start, say what changed."""
        jobs = self.jobs()
        if _try(leads):
            is_busy = self._is_busy is not None and self._num_waiting == 0 and self._is_busy()
            if is_busy:
                _try(busy)
            else:
                busy.release(force=True)
            if self._start_next(jobs):
                jobs = self.jobs()
        if jobs != self._said and self._notify is not None:
            self._notify(jobs)
        self._said = jobs
        return jobs

    def _start_next(self, jobs: list[Summary]) -> bool:
        """Start the oldest job of every device that is free; whether there was one."""
        working = {job["device"] for job in jobs if job["state"] in ACTIVE}
        working |= {job["device"] for job in jobs if job["id"] in self._workers}
        has_started = False
        for job in reversed(jobs):
            is_next = job["state"] == "queued" and job["device"] not in working
            if is_next and not (folder := self.folder(job["id"])).is_held():
                try:
                    self._start(job, folder)
                except OSError as error:  # a full disk; the others are started all the same
                    self._complain(error)
                    continue
                working.add(job["device"])
                has_started = True
        return has_started

    def _start(self, job: Summary, folder: JobFolder) -> None:
        place = folder.place()
        folder.status("preparing", pid=None, **place)  # pid None: the worker has not come so far
        try:
            self._workers[job["id"]] = self._launch(folder.root, device=job["device"])
        except OSError as error:
            message = f"no worker process could be started: {error.strerror or error}"
            folder.status("failed", **place, message=message)

    # --- one job ---------------------------------------------------------------------------------

    def _ids(self) -> list[str]:
        if not self.root.is_dir():
            return []
        places = [place for place in self.root.iterdir() if ID.fullmatch(place.name)]
        return [place.name for place in places if JobFolder(place).is_used()]

    def _summary(self, id: str) -> Summary:
        folder = JobFolder(self.root / id)
        self._reap(id, folder)
        known = self._known.setdefault(id, Known(folder))
        return known.summary(has_process=id in self._workers)

    def _reap(self, id: str, folder: JobFolder) -> None:
        """Where a job's worker ended, let go of it and see that the status says how."""
        worker = self._workers.get(id)
        if worker is None or (code := worker.poll()) is None:
            return
        del self._workers[id]
        now = folder.state()
        if now["state"] != "lost" or code <= 0:
            return
        words = last_words(folder, started=now.get("pid") is not None)
        if words is not None:
            with suppress(OSError):
                message = f"the worker ended with an error: {words}"
                folder.status("failed", **folder.place(), message=message)


def _normal(path: str | Path) -> str:
    return os.path.normcase(os.path.abspath(path))


def _try(lock: FileLock) -> bool:
    with suppress(Timeout):
        if not lock.is_locked:  # a second time would have to be released as well
            lock.acquire(timeout=0)
    return lock.is_locked
