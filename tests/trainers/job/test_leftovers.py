"""Two processes in one folder, temporary files of killed ones, and a folder that is deleted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comfyui_pcpo.trainers.cli import preference
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.errors import RunError, UserError
from comfyui_pcpo.trainers.job import leftovers, locks
from comfyui_pcpo.trainers.job.files import replace_file
from comfyui_pcpo.trainers.job.folder import JobError, JobFolder
from comfyui_pcpo.trainers.job.leftovers import sweep, temporary
from comfyui_pcpo.trainers.job.preflight import hold_folder
from comfyui_pcpo.trainers.run import checkpoint, start
from comfyui_pcpo.trainers.run import publish as publish_module
from comfyui_pcpo.trainers.run.checkpoint import Position
from comfyui_pcpo.trainers.run.held_out import keep_samples
from comfyui_pcpo.trainers.run.publish import publish

GONE = 2**22 - 3
"""No process has that number."""


def refusal(why: str) -> UserError:
    return UserError(why or "taken")


# --- one process in a folder ---------------------------------------------------------------------


def test_a_folder_is_held_once_and_left_as_it_was(tmp_path):
    folder = tmp_path / "a" / "b"
    with (
        pytest.raises(UserError, match="taken"),
        locks.hold(folder, "x.lock", refusal),
        locks.hold(folder, "x.lock", refusal),
    ):
        pass
    assert not (tmp_path / "a").exists()
    folder.mkdir(parents=True)
    with locks.hold(folder, "x.lock", refusal):
        (folder / "kept.txt").write_text("x")
    assert sorted(os.listdir(folder)) == ["kept.txt", "x.lock"]
    assert not locks.is_taken(folder / "x.lock")
    with (
        pytest.raises(UserError, match="exists"),
        locks.hold(folder / "kept.txt", "x.lock", refusal),
    ):
        pass


def test_commands_hold_their_folders(tmp_path):
    with (
        hold_folder(tmp_path, "preference"),
        pytest.raises(ConfigError, match=r"another process \(preference\) works"),
    ):
        preference.main(["make", "x", "y", "--out", str(tmp_path)])
    folder = JobFolder(tmp_path / "run")
    with folder.hold(), pytest.raises(JobError, match="in use by process unknown"), folder.hold():
        pass


def test_who_comes_second_loads_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "prepare", lambda *_: pytest.fail("it was loaded"))
    folder, config = JobFolder(tmp_path / "run"), TrainConfig()
    with folder.hold():
        (tmp_path / "run" / "of_the_winner").write_text("x")
        before = sorted(os.listdir(folder.root))
        with pytest.raises(JobError, match="in use by process unknown"):
            start.train(config, folder.root)
        assert sorted(os.listdir(folder.root)) == before
    folder.start({"config": config.model_dump(mode="json")})
    job = (folder.root / "job.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already"):
        start.train(config, folder.root)
    with folder.hold(), pytest.raises(JobError, match="in use"):
        start.resume(folder.root)
    assert (folder.root / "job.json").read_bytes() == job


def test_a_run_that_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConfigError("it cannot be run")

    monkeypatch.setattr(start, "prepare", refuse)
    with pytest.raises(ConfigError, match="cannot be run"):
        start.train(TrainConfig(), tmp_path / "runs" / "mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_of_two_that_start_together_one_trains(tmp_path):
    words = [sys.executable, "-m", "comfyui_pcpo.trainers", "train", "--preset", "demo"]
    words += ["--run.iterations", "1", "--run.device", "cpu", "--out", str(tmp_path / "run")]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.wait(): process.communicate()[1] for process in both}
    assert set(said) == {0, 2} and said[2].count("\n") == 1
    assert "in use by" in said[2] or "holds a run already" in said[2]
    assert JobFolder(tmp_path / "run").state()["state"] == "done"


# --- a folder that is deleted --------------------------------------------------------------------


def test_a_folder_that_is_deleted_while_its_run_loads(tmp_path, monkeypatch):
    folder = JobFolder(tmp_path / "run")
    folder.start({"config": TrainConfig().model_dump(mode="json"), "inputs": {}})

    def loading(*_, **__):
        shutil.rmtree(folder.root)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(start, "prepare", loading)
    with pytest.raises(RunError, match="was deleted or moved during the run"):
        start.resume(folder.root)
    assert not folder.root.exists()


@pytest.mark.parametrize("write", ["samples", "checkpoint"])
def test_nothing_is_written_where_a_folder_was(tmp_path, write):
    folder = JobFolder(tmp_path / "run")
    with pytest.raises(RunError, match="was deleted or moved"):
        if write == "samples":
            keep_samples(folder, 1, None, [])  # pyright: ignore[reportArgumentType]
        else:
            checkpoint.save(None, folder, Position())  # pyright: ignore[reportArgumentType]
    assert not folder.root.exists()


# --- what killed processes leave -----------------------------------------------------------------


def test_a_killed_process_leaves_a_file_that_is_found(tmp_path):
    script = (
        "import os, sys; from pathlib import Path\n"
        "from comfyui_pcpo.trainers.job.files import replace_file\n"
        "with replace_file(Path(sys.argv[1])) as fresh:\n"
        "  fresh.write_text('half'); print(fresh, flush=True); sys.stdin.read()"
    )
    target = tmp_path / "model.safetensors"
    words = [sys.executable, "-c", script, str(target)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        sweep(tmp_path)
        assert left.exists()  # it is being written
    finally:
        other.kill()
        other.wait()
    assert left.exists()
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_what_is_left_is_removed(tmp_path):
    here, elsewhere = leftovers.machine(), "0" * 8
    old = time.time() - 2 * leftovers.OLD_S
    files = {
        f".a.json.pcpo-{here}-{GONE}.tmp": False,
        f".status.json.{GONE}.tmp": False,  # as earlier versions wrote them
        f"samples/00000/.000.png.pcpo-{here}-{GONE}.tmp": False,
        f".a.json.pcpo-{here}-{os.getppid()}.tmp": True,  # at work
        f".a.json.pcpo-{here}-{os.getpid()}.tmp": True,
        f".a.json.pcpo-{elsewhere}-{GONE}.tmp": True,  # of another container
        f".a.txt.pcpo-{elsewhere}-{GONE}.tmp": False,  # as above, and two days old
        f".b.json.pcpo-{here}-{os.getpid()}.tmp": False,  # of a process that had our number
        f".a.json.{GONE}.tmp": True,  # of another program
        ".a.json.tmp": True,
        f"a.json.{GONE}.tmp": True,
        f".a.json.{GONE}.tmp.bak": True,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    for name in (f".a.txt.pcpo-{elsewhere}-{GONE}.tmp", f".b.json.pcpo-{here}-{os.getpid()}.tmp"):
        os.utime(tmp_path / name, (old, old))
    (tmp_path / f".00004.{GONE}.tmp").mkdir()  # a checkpoint
    (tmp_path / f".00004.{GONE}.tmp" / "state.json").write_text("x")
    sweep(tmp_path)
    there = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert there == {name for name, stays in files.items() if stays}


def test_among_the_loras_of_comfyui_only_our_own_are_removed(tmp_path):
    mark = f"pcpo-{leftovers.machine()}-{GONE}"
    gone = [f".mine.safetensors.{mark}.tmp", f".other.safetensors.{mark}.tmp"]
    gone.append(f".mine.safetensors.{GONE}.tmp")
    stay = [f".other.safetensors.{GONE}.tmp", f"sub/.x.safetensors.{GONE}.tmp", "mine.safetensors"]
    for name in (*gone, *stay):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    sweep(tmp_path, "mine.safetensors", is_deep=False)
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()} == {*stay}


def test_a_deleted_run_takes_its_half_copy_along(tmp_path):
    target = tmp_path / "loras" / "mine.safetensors"
    left = target.with_name(f".{target.name}.pcpo-{leftovers.machine()}-{GONE}.tmp")
    left.parent.mkdir()
    left.write_text("half")
    target.write_text("whole")
    folder = JobFolder(tmp_path / "run")
    folder.start({"config": {"run": {"publish": str(target)}}})
    folder.delete()
    assert os.listdir(target.parent) == ["mine.safetensors"]


def test_a_run_that_is_held_is_swept(tmp_path):
    left = temporary(tmp_path / "report" / "report.html")
    left.parent.mkdir()
    left = left.with_name(left.name.replace(f"-{os.getpid()}.", f"-{GONE}."))
    left.write_text("x")
    with JobFolder(tmp_path).hold():  # of which nothing is known yet
        (tmp_path / "job.json").write_text("{}")
    with JobFolder(tmp_path).hold():
        assert not left.exists()


def test_two_runs_never_publish_over_each_other(tmp_path, monkeypatch):
    target = tmp_path / "loras" / "x.safetensors"
    folders = []
    for name in ("one", "two"):
        folder = JobFolder(tmp_path / name)
        folder.lora.mkdir(parents=True)
        (folder.lora / "pcpo_00001.safetensors").write_text(name)
        folders.append(folder)
    writing = replace_file

    def while_the_other_is_about_to(path: Path, **options):
        monkeypatch.undo()
        assert publish(folders[1], folders[1].last_export(), target) is None
        return writing(path, **options)

    monkeypatch.setattr(publish_module, "replace_file", while_the_other_is_about_to)
    said = publish(folders[0], folders[0].last_export(), target)
    assert target.read_text() == "two" and said is not None and "not of this run" in said
