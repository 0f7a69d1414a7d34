"""Workers: how they are started, what they find, and what they heed of ComfyUI."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import comfyui_pcpo
import pytest
import torch
from comfyui_pcpo.trainers.errors import Stopped, UserError
from comfyui_pcpo.trainers.job import comfyui as server
from comfyui_pcpo.trainers.job import folder as job
from comfyui_pcpo.trainers.job import worker as launch
from comfyui_pcpo.trainers.job.comfyui import Server
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run.control import POLL_S, Control
from comfyui_pcpo.trainers.run.endings import preparing
from comfyui_pcpo.trainers.run.give_back_memory import in_main_memory
from filelock import FileLock

PACK = Path(comfyui_pcpo.__path__[0])


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    made = JobFolder(tmp_path / "0123456789abcdef")
    settings = {"on_server_exit": "save_and_stop", "pause_while_busy": True}
    made.start({"config": {}, "settings": settings})
    return made


# --- the entry -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The pack under a name that is no module's."""
    root = tmp_path_factory.mktemp("custom nodes") / "ComfyUI PCPO-main"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "docs", "tiny_sd", "loras")
    shutil.copytree(PACK, root, ignore=left_out)
    return root


def test_the_entry_works_by_its_path_alone(copy):
    script = (
        "import importlib.util, runpy, sys; entry = sys.argv[1]; sys.argv = [entry, '--help']\n"
        "sys.path.insert(0, entry)\n"
        "try: runpy.run_path(entry, run_name='__main__')\n"
        "except SystemExit as end: print('exit', end.code)\n"
        "print(sys.modules['comfyui_pcpo'].__path__[0])\n"
        "print(importlib.util.find_spec('evaluate'), 'torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, str(copy / "trainers")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "  resume " in said
    assert said.splitlines()[-3:] == ["exit 0", str(copy), "None False"]


def test_the_entry_started_as_a_worker_is(copy, tmp_path):
    words = [sys.executable, str(copy / "trainers"), "resume", str(tmp_path / "nowhere")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "holds no run" in done.stderr


# --- the process ---------------------------------------------------------------------------------


def test_the_environment_is_cleaned():
    base = {
        "PATH": "/bin",
        "PYTHONPATH": "/comfy",
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_FSDP": "1",
        "MASTER_ADDR": "there",
        "HF_HUB_OFFLINE": "0",
    }
    assert launch.environment(base, "mps") == {
        "PATH": "/bin",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUTF8": "1",
    }


@pytest.mark.parametrize(
    ("base", "device", "expected"),
    [
        ({}, "cpu", {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}),
        ({}, "cuda", {"CUDA_VISIBLE_DEVICES": "0"}),
        ({}, "cuda:2", {"CUDA_VISIBLE_DEVICES": "2"}),
        ({"CUDA_VISIBLE_DEVICES": "3, 1"}, "cuda:1", {"CUDA_VISIBLE_DEVICES": "1"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8a"}, "cuda:0", {"CUDA_VISIBLE_DEVICES": "GPU-8a"}),
        (
            {"CUDA_VISIBLE_DEVICES": "5,6", "HIP_VISIBLE_DEVICES": "5,6"},
            "cuda:1",
            {"CUDA_VISIBLE_DEVICES": "6", "HIP_VISIBLE_DEVICES": "6"},
        ),
        ({"CUDA_VISIBLE_DEVICES": "5"}, "mps", {}),
    ],
)
def test_a_worker_sees_its_device_alone(base, device, expected):
    assert launch.visible(base, device) == expected


def test_ctrl_c_and_closed_windows_do_not_reach_a_worker():
    windows = launch.detached_options("nt")
    assert windows == {"start_new_session": 0, "creationflags": 0x08000200}
    assert launch.detached_options("posix") == {"start_new_session": 1, "creationflags": 0}


def test_a_worker_is_a_process_of_its_own(folder, monkeypatch):
    script = "import os, sys; print(os.getsid(0) == os.getpid(), os.getcwd(), file=sys.stderr)"
    monkeypatch.setattr(launch, "command", lambda folder: [sys.executable, "-c", script])
    assert launch.start(folder.root).wait(30) == 0
    said = (folder.root / launch.STDERR).read_text()
    assert said == f"True {folder.root.parent}\n"


# --- what it heeds -------------------------------------------------------------------------------


def test_the_server_is_seen_to_end(folder, monkeypatch):
    monkeypatch.setattr(server, "POLL_S", 0.0)
    root = folder.root.parent
    lock = FileLock(root / launch.SERVER_LOCK)
    lock.acquire()
    control = Control(folder, root)
    control.check()
    lock.release()
    with pytest.raises(Stopped, match="because ComfyUI ended"):
        control.check()
    Server(root, {"on_server_exit": "continue"}).is_gone()
    assert not Server(root, {"on_server_exit": "continue"}).is_gone()
    Control(folder).check()  # started by hand


def test_a_run_waits_for_a_busy_queue(folder, monkeypatch):
    root, seen = folder.root.parent, []
    busy = FileLock(root / launch.BUSY_LOCK, thread_local=False)
    FileLock(root / launch.SERVER_LOCK).acquire()
    busy.acquire()
    monkeypatch.setattr("comfyui_pcpo.trainers.run.control.HEARTBEAT_S", 0.0)

    def sleep(seconds: float) -> None:
        seen.append((seconds, folder.read("status.json")))
        if len(seen) == 2:
            busy.release()

    monkeypatch.setattr("comfyui_pcpo.trainers.run.control.time.sleep", sleep)
    assert Control(folder, root).between(3, 9) is False
    assert [seconds for seconds, _ in seen] == [POLL_S] * 2
    first, second = (status for _, status in seen)
    assert first["state"] == "paused" and first["message"] == "waiting for ComfyUI's queue"
    assert (first["iteration"], first["of"]) == (3, 9)
    assert second["heartbeat"] > first["heartbeat"]
    assert folder.read("status.json")["state"] == "running"
    assert "message" not in folder.read("status.json")


def test_what_waits_gives_its_memory_back():
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    with in_main_memory([module, torch.nn.Sequential()]):
        assert module.weight is weight
    assert module.weight is weight


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_waits_leaves_the_gpu():
    module = torch.nn.Linear(1024, 1024).cuda()
    weight, before = module.weight, module.weight.detach().clone()
    with in_main_memory([module]):
        assert module.weight is weight and weight.device.type == "cpu"
    assert weight.device.type == "cuda" and weight.equal(before)


# --- how it fails --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (UserError("the model\nis gone"), "failed", "the model is gone"),
        (ImportError("no module named 'peft'"), "failed", "ImportError: no module named 'peft'"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt: "),
        (ValueError("x" * 9000), "failed", f"ValueError: {'x' * 488}"),
    ],
)
def test_a_worker_that_fails_while_it_loads_says_so(folder, error, state, said):
    folder.status("running", iteration=4, of=9)
    with pytest.raises(type(error)), folder.hold(), preparing(folder):
        assert folder.state()["state"] == "preparing"
        raise error
    now = folder.read("status.json")
    assert (now["state"], now["iteration"], now["of"]) == (state, 4, 9)
    assert now["message"] == said.strip()


def test_what_a_dead_worker_was_asked_is_forgotten(folder):
    with folder.hold():
        folder.ask("stop")
    with folder.hold(), preparing(folder):
        assert folder.request() is None
        folder.ask("stop")  # while it loads: heeded before the first iteration
        with pytest.raises(Stopped, match="as asked"):
            Control(folder).between(0, 9)


def test_a_folder_that_is_only_looked_at_can_be_held(folder, monkeypatch):
    monkeypatch.setattr(job, "PATIENCE_S", 60.0)
    with folder.hold():
        pass
    lock = FileLock(folder.root / "job.lock", thread_local=False)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    started = time.monotonic()
    with folder.hold():
        assert 0.1 < time.monotonic() - started < 30
