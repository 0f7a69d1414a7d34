"""The registry of jobs: its queue, its workers, and what is left when either side dies.

Most workers here train nothing (fixtures/worker_fixture.py); the last tests start real ones.
"""

from __future__ import annotations

import itertools
import json
import math
import ntpath
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comfyui_pcpo.nodes.jobs import registry as jobs_module
from comfyui_pcpo.nodes.jobs import view as jobs_view
from comfyui_pcpo.nodes.jobs.registry import JobRegistry, UnknownJob
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job import worker as launch
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.job.metrics import Latest
from warm_fixture import Process, started

WORKER = Path(__file__).parents[1] / "fixtures" / "worker_fixture.py"
CONFIG = TrainConfig()
STOPPING = {"on_server_exit": "save_and_stop"}


def worker(count: int = 3, seconds: float = 0.05) -> Callable[..., subprocess.Popen[bytes]]:
    """A launcher of workers that train nothing."""

    def start(root: Path, *, device: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, str(WORKER), str(root), str(count), str(seconds)]
        with (root / launch.STDERR).open("wb") as stderr:
            return subprocess.Popen(words, stderr=stderr, start_new_session=True)

    return start


@pytest.fixture
def make(tmp_path):
    made: list[JobRegistry] = []

    def registry(start: Any = None, **options: Any) -> JobRegistry:
        made.append(JobRegistry(tmp_path / "jobs", start or worker(), **options))
        return made[-1]

    yield registry
    for one in made:
        one.close()
        for process in one._workers.values():
            process.kill()
            process.wait()


def until(jobs: JobRegistry, id: str, *states: str, seconds: float = 60) -> dict[str, Any]:
    """The job's summary once it is in one of the states."""
    end = time.monotonic() + seconds
    while (now := jobs.summary(id))["state"] not in states:
        assert time.monotonic() < end, now
        time.sleep(0.02)
    return now


def ended(jobs: JobRegistry, id: str) -> None:
    """Wait for a job's process, and for the thread that looks after jobs."""
    process, thread = jobs._workers.get(id), jobs._thread
    if process is not None:
        process.wait(20)
    if thread is not None:
        thread.join(20)
    jobs.jobs()


def create(jobs: JobRegistry, name: str = "first", device: str = "cpu", **settings: Any) -> str:
    return jobs.create(CONFIG, name, device, settings)


def pid(jobs: JobRegistry, id: str) -> int:
    return jobs.folder(id).read("status.json")["pid"]


# --- the queue -----------------------------------------------------------------------------------


def test_a_job_runs_to_its_end(make):
    jobs = make()
    id = create(jobs, "scenes", on_server_exit="continue")
    assert jobs_module.ID.fullmatch(id)
    done = until(jobs, id, "done")
    assert done | {"created": 0} == {
        "id": id,
        "name": "scenes",
        "state": "done",
        "iteration": 3,
        "of": 3,
        "eta_seconds": None,
        "message": "held-out reward 0.1 -> 0.2",
        "created": 0,
        "device": "cpu",
        "publish": None,
        "user": None,
        "reward": pytest.approx(2 / 3),
        "held_out": None,
        "before": None,
    }
    assert abs(done["created"] - time.time()) < 60
    assert JobFolder(jobs.root / id).job()["settings"] == {"on_server_exit": "continue"}


def test_jobs_wait_for_their_device_in_order(make):
    jobs = make(worker(count=60))
    ids = [create(jobs, name) for name in ("first", "second")]
    other = create(jobs, "elsewhere", device="cuda:0")
    until(jobs, other, "running", "done")
    assert jobs.summary(ids[0])["state"] in ("preparing", "running")
    assert jobs.summary(ids[1])["state"] == "queued"
    assert jobs.summary(ids[1])["of"] == CONFIG.run.iterations
    until(jobs, ids[0], "done")
    until(jobs, ids[1], "done")
    written = [(jobs.folder(id).root / "metrics.jsonl").stat() for id in ids]
    started = (jobs.folder(ids[1]).root / launch.STDERR).stat().st_mtime_ns
    assert written[0].st_mtime_ns < started < written[1].st_mtime_ns
    assert [job["name"] for job in jobs.jobs()] == ["elsewhere", "second", "first"]


def test_a_job_pauses_continues_and_stops(make):
    jobs = make(worker(count=1000))
    id, waiting = create(jobs), create(jobs, "second")
    until(jobs, id, "running")
    with pytest.raises(JobError, match="second is queued and cannot pause yet"):
        jobs.ask(waiting, "pause")
    jobs.ask(id, "pause")
    assert jobs.summary(id)["state"] in ("pausing", "paused")
    until(jobs, id, "paused")
    with pytest.raises(JobError, match="first is paused; samples are made while it runs"):
        jobs.ask(id, "sample")
    jobs.ask(id, "continue")
    until(jobs, id, "running")
    jobs.ask(id, "stop")
    with pytest.raises(JobError, match="first is stopp"):
        jobs.ask(id, "pause")
    assert until(jobs, id, "stopped")["message"] == "stopped as asked"
    until(jobs, waiting, "running")
    jobs.ask(waiting, "stop")
    until(jobs, waiting, "stopped")


def test_a_queued_job_can_be_taken_out_and_put_back(make):
    jobs = make(worker(count=1000))
    first, second = create(jobs), create(jobs, "second")
    until(jobs, first, "running")
    jobs.ask(second, "stop")
    assert jobs.summary(second)["message"] == "taken out of the queue"
    jobs.resume(second)
    assert jobs.summary(second)["state"] == "queued"
    with pytest.raises(JobError, match="second is queued; there is nothing to resume"):
        jobs.resume(second)
    jobs.delete(second)
    with pytest.raises(UnknownJob):
        jobs.summary(second)
    with pytest.raises(JobError, match="first is running; stop it first, then delete it"):
        jobs.delete(first)
    jobs.ask(first, "stop")
    until(jobs, first, "stopped")
    ended(jobs, first)
    jobs.delete(first)
    assert [path.name for path in jobs.root.iterdir() if path.is_dir()] == []


# --- what dies -----------------------------------------------------------------------------------


def test_a_killed_worker_is_lost_and_goes_on(make):
    jobs = make(worker(count=20))
    id = create(jobs)
    until(jobs, id, "running")
    os.kill(pid(jobs, id), signal.SIGKILL)
    lost = until(jobs, id, "lost")
    assert lost["message"] == "the worker was killed; resume to go on from its last checkpoint"
    with pytest.raises(JobError, match="first is lost and cannot pause; resume it first"):
        jobs.ask(id, "pause")
    jobs.resume(id)
    assert until(jobs, id, "done")["iteration"] == 20
    assert [line["iteration"] for line in jobs.folder(id).metrics()] == list(range(1, 21))


def test_a_worker_that_dies_before_its_first_word(make):
    script = ["import os; os.kill(os.getpid(), 9)"]

    def start(root: Path, *, device: str) -> subprocess.Popen[bytes]:
        with (root / launch.STDERR).open("wb") as stderr:
            return subprocess.Popen([sys.executable, "-c", script[0]], stderr=stderr)

    jobs = make(start)
    id = create(jobs)
    assert "killed" in until(jobs, id, "lost", "failed")["message"]
    script[0] = "import no_such_module"
    jobs.resume(id)
    assert until(jobs, id, "lost", "failed")["message"] == (
        "the worker ended with an error: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert any("Traceback" in line for line in jobs.job(id)["log"])


def test_a_process_that_cannot_be_started(make):
    def start(root: Path, *, device: str) -> subprocess.Popen[bytes]:
        raise FileNotFoundError(2, "No such file or directory")

    jobs = make(start)
    now = until(jobs, create(jobs), "failed")
    assert now["message"] == "no worker process could be started: No such file or directory"


@pytest.mark.parametrize("setting", ["continue", "save_and_stop"])
def test_the_server_ends_and_another_takes_over(make, setting):
    first = make(worker(count=400, seconds=0.01))
    id = create(first, on_server_exit=setting)
    until(first, id, "running")
    first.close()  # lets go of server.lock, as the system does for a process that was killed
    if setting == "save_and_stop":
        second = make()
        second.wake = lambda: None  # it only looks on
        ended = until(second, id, "stopped", seconds=15)
        assert ended["message"] == "saved and stopped, as set, because ComfyUI ended"
        return
    second = make(worker(count=400, seconds=0.01))
    queued = create(second, "second")
    assert second.summary(id)["state"] == "running"
    time.sleep(1.5)
    assert second.summary(queued)["state"] == "queued"  # one at a time still
    second.ask(id, "pause")
    until(second, id, "paused")
    second.ask(id, "stop")
    until(second, id, "stopped")
    until(second, queued, "running", "done")


def test_two_servers_start_no_job_twice(make):
    first, second = make(worker(count=40)), make(worker(count=40))
    id = create(first)
    until(first, id, "running")
    queued = create(second, "second")
    time.sleep(1.2)
    assert not second._workers
    until(first, id, "done")
    until(second, queued, "running", "done")
    assert not second._workers  # the first one saw it
    until(first, queued, "done")
    ended(first, queued)  # it looks after nothing now, and lets the other one
    last = create(second, "third")
    until(second, last, "running")
    assert last in second._workers
    until(second, last, "done")


# --- ComfyUI's queue, and messages ---------------------------------------------------------------


def test_a_job_waits_while_the_queue_is_busy(make):
    is_busy = [False]
    jobs = make(worker(count=200), is_busy=lambda: is_busy[0])
    id = create(jobs, pause_while_busy=True)
    until(jobs, id, "running")
    is_busy[0] = True
    assert until(jobs, id, "paused")["message"] == "waiting for ComfyUI's queue"
    with jobs.waited_for():  # a node that waits for the job keeps the queue busy
        until(jobs, id, "running")
    until(jobs, id, "paused")
    is_busy[0] = False
    until(jobs, id, "running")
    jobs.ask(id, "stop")
    until(jobs, id, "stopped")


def test_messages_are_sent_where_something_changed(make):
    sent: list[tuple[float, list[dict[str, Any]]]] = []
    jobs = make(worker(count=30), notify=lambda said: sent.append((time.monotonic(), said)))
    id = create(jobs)
    until(jobs, id, "running")
    jobs.ask(id, "pause")
    until(jobs, id, "paused")
    time.sleep(1.1)
    before = len(sent)
    time.sleep(1.5)
    assert len(sent) == before
    jobs.ask(id, "continue")
    until(jobs, id, "done")
    ended(jobs, id)
    assert sent[-1][1][0]["state"] == "done" and sent[0][1][0]["id"] == id
    times = [at for at, _ in sent]
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.45
    assert all(a != b for (_, a), (_, b) in itertools.pairwise(sent))


def test_a_fault_does_not_end_the_watch(make, monkeypatch, caplog):
    jobs = make(worker(count=5))
    real, faults = jobs.jobs, []

    def failing() -> list[dict[str, Any]]:
        if len(faults) < 2 and threading.current_thread().name == "pcpo-jobs":
            faults.append(1)
            raise PermissionError(13, "it is being replaced")
        return real()

    monkeypatch.setattr(jobs, "jobs", failing)
    until(jobs, create(jobs), "done")
    assert len(faults) == 2
    assert len([r for r in caplog.records if "cannot look after" in r.message]) == 1  # once


# --- names and places ----------------------------------------------------------------------------


def test_a_name_is_never_two_jobs(make, tmp_path):
    jobs = make()
    loras = tmp_path / "loras"
    loras.mkdir()

    def publishing(name: str) -> TrainConfig:
        run = CONFIG.run.model_copy(update={"publish": str(loras / f"{name}.safetensors")})
        return CONFIG.model_copy(update={"run": run})

    assert jobs.free_name(loras, "mine") == "mine"
    jobs.create(publishing("mine"), "mine", "cpu")
    assert jobs.free_name(loras, "mine") == "mine-2"
    (loras / "mine-2.safetensors").write_bytes(b"")
    assert jobs.free_name(loras, "mine") == "mine-3"
    for taken in ("mine", "mine-2"):
        with pytest.raises(JobError, match="choose another name"):
            jobs.create(publishing(taken), taken, "cpu")
    jobs.create(publishing("mine-3"), "mine-3", "cpu")


def test_paths_are_compared_as_windows_does(monkeypatch):
    monkeypatch.setattr(jobs_module.os, "path", ntpath)
    same = jobs_module._normal("C:\\Loras\\Mine.safetensors")
    assert jobs_module._normal("c:/loras/mine.safetensors") == same


@pytest.mark.parametrize(
    "id", ["", ".", "..", "../jobs", "0" * 15, "A" * 16, "0" * 16, "0" * 16 + "\n", "job.json"]
)
def test_nothing_but_an_id_finds_a_job(make, id):
    jobs = make()
    create(jobs)
    for ask in (jobs.folder, jobs.summary, jobs.job, jobs.resume, jobs.delete):
        with pytest.raises(UnknownJob, match="there is no job"):
            ask(id)


def test_a_job_may_have_its_inputs_first(make):
    jobs = make()
    place = jobs.root / ("ab" * 8)
    place.mkdir(parents=True)
    (place / "prompts.txt").write_text("a red circle")
    assert jobs.jobs() == []
    assert jobs.create(CONFIG, "first", "cpu", id=place.name) == place.name
    for taken in (place.name, "../there", "AB" * 8):
        with pytest.raises(JobError, match="not a valid id for a new job"):
            jobs.create(CONFIG, "second", "cpu", id=taken)
    until(jobs, place.name, "done")
    assert (place / "prompts.txt").exists()


def test_no_job_is_made_where_nothing_can_be_written(tmp_path):
    (tmp_path / "user").write_text("a file")
    jobs = JobRegistry(tmp_path / "user" / "jobs", worker())
    with pytest.raises(JobError, match="cannot be written to"):
        create(jobs)
    assert jobs.jobs() == [] and jobs._thread is None


# --- what is shown -------------------------------------------------------------------------------


def test_a_job_in_detail(make):
    jobs = make(worker(count=1))
    id = create(jobs)
    until(jobs, id, "done")
    folder = jobs.folder(id)
    with folder.metrics_file.open("a", encoding="utf-8") as lines:  # as versions before wrote them
        for iteration in range(2, 1200):
            extra = {"held_out": 0.5} if iteration % 100 == 0 else {}
            line = {"iteration": iteration, "reward": math.nan, "log_ratio_histogram": [1, 2]}
            lines.write(json.dumps(line | extra) + "\n")
    for iteration in (0, 10):
        place = folder.samples / f"{iteration:05}"
        place.mkdir(parents=True)
        (place / "000.png").write_bytes(b"png")
        (place / "scores.json").write_text('[{"prompt": "a", "reward": 0.25}]')
    folder.lora.mkdir()
    (folder.lora / "pcpo_00010.safetensors").write_bytes(b"")
    folder.log.write_text("".join(f"line {i}\n" for i in range(80)))
    job = jobs.job(id)
    json.dumps(job, allow_nan=False)
    assert len(job["metrics"]) <= jobs_view.MAX_LINES < 1199
    assert job["measured"]["count"] == 1199 and job["measured"]["width"] > 1
    assert job["sampled"] == 2
    assert [line["iteration"] for line in job["metrics"] if "held_out" in line] == [
        *range(100, 1200, 100)
    ]
    assert job["metrics"][-1] | {"reward": 0} == {
        "iteration": 1199,
        "reward": 0,
        "log_ratio_histogram": [1, 2],
    }
    assert (
        job["metrics"][5].get("reward") is None and "log_ratio_histogram" not in job["metrics"][5]
    )
    assert job["samples"] == [
        {"iteration": i, "scores": [{"prompt": "a", "reward": 0.25}], "count": 1} for i in (0, 10)
    ]
    assert job["exports"] == ["pcpo_00010.safetensors"]
    assert job["log"] == [f"line {i}" for i in range(30, 80)]
    assert job["folder"] == str(folder.root) and job["before"] == 0.25
    assert job["config"] == CONFIG.model_dump(mode="json")


def test_numbers_are_followed_and_read_again_after_a_resume(tmp_path):
    folder = JobFolder(tmp_path)
    metrics = Latest(folder.metrics_file, ("iteration", "held_out", "reward"))
    assert metrics.values() == {}
    folder.add_metrics({"iteration": 1, "held_out": 0.5})
    folder.add_metrics({"iteration": 2})
    assert metrics.values() == {"iteration": 2, "held_out": 0.5}
    with metrics.file.open("a") as file:
        file.write('{"iteration": 3, "rew')
    assert metrics.values()["iteration"] == 2
    with metrics.file.open("a") as file:
        file.write('ard": 0.1}\n')
    assert metrics.values() == {"iteration": 3, "held_out": 0.5, "reward": 0.1}
    folder.cut_metrics(0)
    folder.add_metrics({"iteration": 1})
    assert metrics.values() == {"iteration": 1}


# --- nothing is left behind ----------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")
def test_twenty_cycles_leave_nothing_behind(make):
    jobs = make(worker(count=1000))
    id = create(jobs)
    counts = []
    for _ in range(20):
        until(jobs, id, "running")
        process = jobs._workers[id]
        jobs.ask(id, "stop")
        until(jobs, id, "stopped")
        ended(jobs, id)
        assert jobs._thread is None and not jobs._workers
        assert not Path(f"/proc/{process.pid}").exists()
        counts.append((open_files(), threading.active_count()))
        jobs.resume(id)
    assert counts[0] == counts[-1], counts


# --- real workers --------------------------------------------------------------------------------

SMALL = {
    "prompts": {"per_iteration": 2, "images_per_prompt": 2},
    "sampler": {"steps": 3},
    "advantage": {"min_count": 3},
    "run": {
        "iterations": 5,
        "micro_batch": 4,
        "save_every": 5,
        "eval_prompts": 2,
        "eval_steps": 2,
        "device": "cpu",
    },
}


def test_a_full_disk_and_a_kill_cost_nothing(make, tmp_path):
    """The LoRA of a job that met both is byte for byte that of one that met neither."""
    room: list[int] = []

    def start(root: Path, *, device: str) -> Process | subprocess.Popen[bytes]:
        if len(jobs.jobs()) == 1:
            return launch.start(root, device=device)
        words, env = launch.command(root)[1:], launch.environment(os.environ, device)
        process = started(*words, env=env, cwd=root.parent)
        if room:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room[0], room[0]))
        return process

    jobs = make(start)
    config = TrainConfig.model_validate(SMALL)
    straight = jobs.create(config, "straight", "cpu")
    until(jobs, straight, "done", seconds=200)

    room.append(100_000)
    broken = jobs.create(config, "broken", "cpu")
    full = until(jobs, broken, "failed", seconds=200)
    assert "the checkpoint of iteration 1 could not be written" in full["message"]
    assert "put that right and resume" in full["message"]
    room.clear()
    jobs.resume(broken)
    until(jobs, broken, "running", seconds=200)
    while not jobs.folder(broken).checkpoints.joinpath("00002").exists():
        time.sleep(0.02)
    os.kill(pid(jobs, broken), signal.SIGKILL)
    until(jobs, broken, "lost")
    jobs.resume(broken)
    until(jobs, broken, "done", seconds=200)

    exports = [[*jobs.folder(id).exports().values()] for id in (straight, broken)]
    assert [file.name for file in exports[1]] == ["pcpo_00005.safetensors"]
    assert exports[0][0].read_bytes() == exports[1][0].read_bytes()
    assert jobs.folder(straight).job()["inputs"]["model"]
