"""The job folder, what is asked of a run, and `pcpo jobs`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from comfyui_pcpo.trainers.cli import jobs
from comfyui_pcpo.trainers.errors import RunError, Stopped
from comfyui_pcpo.trainers.job import locks
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.run.control import Control

JOB = {
    "config": {
        "model": {"source": "demo"},
        "method": {"credit": "native", "ratio": "density", "objective": "ppo_clip"},
        "rewards": {"scene": 1.0},
    },
    "versions": {},
}


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    made = JobFolder(tmp_path / "runs" / "first")
    made.start(JOB)
    return made


def test_only_one_process_works_in_a_folder(folder):
    hold = "import sys,time; from pathlib import Path\n"
    hold += "from comfyui_pcpo.trainers.job.folder import JobFolder\n"
    hold += "with JobFolder(Path(sys.argv[1])).hold():\n  print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(folder.root)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        folder.status("running")
        assert folder.is_held()
        with pytest.raises(JobError, match=f"in use by process {os.getpid()}"), folder.hold():
            pass
        with pytest.raises(JobError, match="being worked in"):
            folder.delete()
    finally:
        other.kill()
        other.wait()
    assert not folder.is_held()  # the system let go of it
    with folder.hold():
        assert folder.is_held()


def test_a_worker_that_died_is_lost(folder):
    assert folder.state()["state"] == "queued"
    with folder.hold():
        folder.status("running", iteration=3, of=9)
        assert folder.state()["state"] == "running"
        folder.ask("pause")
        assert folder.state()["state"] == "pausing"
        folder.status("paused", iteration=3, of=9)
        assert folder.state()["state"] == "paused"
        folder.ask("stop")
        assert folder.state()["state"] == "stopping"
        folder.clear_request()
    assert folder.state() | {"heartbeat": 0} == folder.read("status.json") | {
        "state": "lost",
        "heartbeat": 0,
    }
    folder.status("done")
    assert folder.state()["state"] == "done"


def test_status_of_a_deleted_folder_is_not_written(folder):
    folder.delete()
    folder.status("running")
    assert not folder.root.exists()


def test_a_run_of_another_user_is_in_the_state_that_it_says(folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    folder.status("running", iteration=1)
    (folder.root / "job.lock").touch()
    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    assert folder.state()["state"] == "running"


def test_metrics_are_cut_to_an_iteration(folder):
    for iteration in range(1, 5):
        folder.add_metrics({"iteration": iteration})
    with (folder.root / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "rew')
    folder.cut_metrics(3)
    assert folder.metrics() == [{"iteration": i} for i in (1, 2, 3)]
    assert (folder.root / "metrics.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"other": 1}'])
def test_a_job_file_that_cannot_be_read_is_refused(folder, text):
    (folder.root / "job.json").write_text(text)
    with pytest.raises(JobError, match="cannot be read"):
        folder.job()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="--out"):
        JobFolder(tmp_path / "file" / "run").start(JOB)


# --- control -------------------------------------------------------------------------------------


def test_a_run_pauses_continues_samples_and_stops(folder):
    control, samples = Control(folder), []
    with folder.hold():
        assert control.between(0, 9) is False
        folder.ask("sample")
        assert control.between(1, 9) is True
        assert control.between(1, 9) is False  # once only
        folder.ask("pause")
        waiting = threading.Thread(target=lambda: samples.append(control.between(2, 9)))
        waiting.start()
        deadline = time.monotonic() + 5
        while folder.state()["state"] != "paused" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert folder.state() | {"iteration": 2, "of": 9} == folder.state()
        assert waiting.is_alive()
        folder.ask("continue")
        waiting.join(5)
        assert samples == [False] and folder.state()["state"] == "running"
        folder.ask("stop")
        with pytest.raises(Stopped):
            control.between(3, 9)
        assert folder.request() is None  # a resumed run does not stop again


def test_the_first_signal_stops_and_the_second_interrupts(folder):
    control = Control(folder)
    before = signal.getsignal(signal.SIGTERM)
    with control.signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            control.check()
        with pytest.raises(Stopped):
            control.between(0, 9)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_stops_where_its_folder_changes(folder):
    control = Control(folder)
    (folder.root / "job.json").write_text(json.dumps(JOB | {"config": {}}))
    with pytest.raises(RunError, match=r"job\.json was edited"):
        control.between(0, 9)
    folder.start(JOB)
    assert control.between(0, 9) is False
    folder.delete()
    with pytest.raises(RunError, match="was deleted"):
        control.between(0, 9)


# --- pcpo jobs -----------------------------------------------------------------------------------


def test_jobs_are_listed_shown_and_deleted(folder, capsys, monkeypatch):
    folder.add_metrics({"iteration": 1, "reward": 0.25, "held_out": 0.5})
    folder.status("done", iteration=1, of=1, message="held-out reward 0.400 -> 0.500")
    assert jobs.main(["list", str(folder.root.parent)]) == 0
    line = capsys.readouterr().out
    assert line.split()[:3] == ["first", "done", "1/1"] and "0.400 -> 0.500" in line
    assert jobs.main(["show", str(folder.root)]) == 0
    shown = capsys.readouterr().out
    assert "native credit, density, ppo_clip" in shown and "held out 0.500" in shown

    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert jobs.main(["delete", str(folder.root)]) == 0
    assert folder.root.exists()
    assert jobs.main(["delete", str(folder.root), "--yes"]) == 0
    assert not folder.root.exists()


def test_nobody_is_asked_where_no_worker_is(folder):
    with pytest.raises(JobError, match="no worker"):
        jobs.main(["stop", str(folder.root)])
    with folder.hold():
        assert jobs.main(["stop", str(folder.root)]) == 0
        assert folder.request() == "stop"


def test_a_folder_that_is_no_run_is_never_deleted(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(JobError, match="no run"):
        jobs.main(["delete", str(tmp_path), "--yes"])
    assert (tmp_path / "mine.txt").exists()
    with pytest.raises(JobError, match="no folder"):
        jobs.main(["list", str(tmp_path / "nowhere")])
