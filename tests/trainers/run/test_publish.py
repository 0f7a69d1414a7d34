"""The LoRA that a run keeps up to date beyond its folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, TrainConfig
from comfyui_pcpo.trainers.job import files
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run import loop, publish
from comfyui_pcpo.trainers.run.publish import Published, check_publish
from comfyui_pcpo.trainers.run.publish import publish as put

SMALL = [
    *("--run.iterations", "4", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "3", "--method.selection", "all", "--run.micro-batch", "4"),
    *("--run.save-every", "2", "--run.eval-prompts", "2", "--run.eval-steps", "2"),
]


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def folder(tmp_path) -> JobFolder:
    made = JobFolder(tmp_path / "job")
    made.start({"config": {}})
    made.lora.mkdir()
    return made


@pytest.fixture
def target(tmp_path) -> Path:
    (tmp_path / "loras").mkdir()
    return tmp_path / "loras" / "mine.safetensors"


def export(folder: JobFolder, iteration: int) -> Path:
    file = folder.lora / f"pcpo_{iteration:05}.safetensors"
    file.write_bytes(f"weights of {iteration}".encode())
    return file


def config(target: Path) -> TrainConfig:
    return TrainConfig.model_validate({"run": {"publish": str(target)}})


# --- one file ------------------------------------------------------------------------------------


def test_the_newest_export_is_published(folder, target):
    for iteration in (9, 10, 100_000):
        newest = export(folder, iteration)
        assert put(folder, newest, target) is None
        assert target.read_bytes() == newest.read_bytes()
    assert folder.last_export() == newest
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_file_of_another_origin_is_left(folder, target):
    target.write_bytes(b"precious")
    said = put(folder, export(folder, 1), target)
    assert (
        said == f"{target} is not of this run and was left as it is; the LoRA is in {folder.lora}"
    )
    assert target.read_bytes() == b"precious"
    target.unlink()
    assert put(folder, export(folder, 1), target) is None
    target.write_bytes(b"edited since")
    assert "not of this run" in (put(folder, export(folder, 2), target) or "")


def test_a_kill_between_record_and_file_leaves_no_doubt(folder, target, monkeypatch):
    put(folder, export(folder, 1), target)

    def killed(*_):
        raise KeyboardInterrupt

    for iteration in (2, 3):  # twice in a row
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(publish.shutil, "copyfile", killed)
            put(folder, export(folder, iteration), target)
    assert target.read_bytes() == b"weights of 1"
    assert put(folder, export(folder, 4), target) is None
    assert target.read_bytes() == b"weights of 4"


def test_what_a_killed_copy_left_is_removed(folder, target):
    leftover = target.with_name(f".{target.name}.1234.tmp")
    other = target.with_name(".other.safetensors.1234.tmp")
    for file in (leftover, other):
        file.write_bytes(b"part")
    put(folder, export(folder, 1), target)
    assert sorted(path.name for path in target.parent.iterdir()) == [other.name, target.name]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "Permission denied"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_said(folder, target, monkeypatch, error, why):
    put(folder, export(folder, 1), target)

    def refuse(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(publish.shutil, "copyfile", refuse)
        said = put(folder, export(folder, 2), target)
    assert said == f"{target} could not be written ({why}); the LoRA is in {folder.lora}"
    assert target.read_bytes() == b"weights of 1"
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert put(folder, export(folder, 3), target) is None  # once that is put right


def test_a_file_that_windows_keeps_open_is_waited_for(folder, target, monkeypatch):
    put(folder, export(folder, 1), target)
    real, tries = os.replace, []

    def busy(fresh, path):
        if Path(path) == target:
            tries.append(1)
            if len(tries) < 3:
                raise PermissionError(13, "The process cannot access the file")
        return real(fresh, path)

    monkeypatch.setattr(files.os, "replace", busy)
    assert put(folder, export(folder, 2), target) is None
    assert target.read_bytes() == b"weights of 2" and len(tries) == 3


def test_what_is_in_the_way_is_said_once_and_shown_until_it_is_gone(folder, target):
    said: list[str] = []
    target.write_bytes(b"precious")
    published = Published(folder, str(target), said.append)
    assert published.update(None) == "" and published.fields == {}  # nothing to publish yet
    made = export(folder, 1)
    note = published.update(made)
    assert note.startswith("; ") and published.fields == {"message": note[2:]}
    assert published.update(made) == note and said == [note[2:]]
    target.unlink()
    assert published.update(made) == "" and published.fields == {}
    assert target.exists()


def test_a_new_run_never_begins_where_a_file_is(target):
    check_publish(config(target))
    target.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="which exists; choose another name"):
        check_publish(config(target))
    with pytest.raises(ValueError, match="publish"):
        config(target.with_suffix(".ckpt"))


# --- a run ---------------------------------------------------------------------------------------


def fails_at(monkeypatch, call: int, fault) -> None:
    """Do something before the n-th update."""
    real, calls = loop.update, []

    def wrapped(*args):
        calls.append(1)
        if len(calls) == call:
            fault()
        return real(*args)

    monkeypatch.setattr(loop, "update", wrapped)


def test_a_run_publishes_at_each_save_and_where_it_is_stopped(
    tmp_path, target, capsys, monkeypatch
):
    root, loras = tmp_path / "run", target.parent
    command = ["train", "--preset", "demo", "--out", str(root), *SMALL]
    command += ["--run.publish", str(target)]

    def aside() -> None:
        JobFolder(root).ask("stop")
        assert target.read_bytes() == (root / "lora" / "pcpo_00002.safetensors").read_bytes()
        shutil.rmtree(loras)
        loras.write_bytes(b"")  # no folder: not even root can write in it

    fails_at(monkeypatch, 3, aside)
    assert main(command) == 0
    status = JobFolder(root).read("status.json")
    assert status["state"] == "stopped"
    assert status["message"].startswith(f"stopped as asked; {target} could not be written (")
    assert [file.name for file in JobFolder(root).exports().values()] == [
        "pcpo_00002.safetensors",
        "pcpo_00003.safetensors",
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["resume", str(root)]) == 0  # the run goes on without
    status = JobFolder(root).read("status.json")
    assert status["state"] == "done" and "could not be written" in status["message"]
    loras.unlink()
    loras.mkdir()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["resume", str(root)]) == 0  # nothing is left to train
    assert target.read_bytes() == (root / "lora" / "pcpo_00004.safetensors").read_bytes()
    assert "could not" not in JobFolder(root).read("status.json")["message"]
    capsys.readouterr()
    command[4] = str(tmp_path / "another")
    assert main(command) == 2
    assert "which exists; choose another name" in capsys.readouterr().err
    assert not (tmp_path / "another").exists()
