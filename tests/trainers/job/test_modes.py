"""What a run writes can be read by those whom the umask lets read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.job.files import copy_folder, replace_file, write_json
from comfyui_pcpo.trainers.lora.safetensors_file import write_safetensors
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
UMASKS = (0o022, 0o002, 0o077)
TINY = [
    *("--run.iterations", "2", "--prompts.per-iteration", "2", "--prompts.images-per-prompt", "2"),
    *("--sampler.steps", "2", "--method.selection", "all", "--run.micro-batch", "4"),
    *("--run.save-every", "1", "--run.eval-prompts", "2", "--run.eval-steps", "1"),
    *("--guard.every", "1", "--guard.prompts", "1", "--guard.images", "2", "--run.tensorboard"),
]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)
    AcceleratorState._reset_state(reset_partial_state=True)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def assert_follow(root: Path, umask: int) -> None:
    wrong = {
        str(path.relative_to(root)): oct(mode(path))
        for path in root.rglob("*")
        if mode(path) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong


def test_a_replaced_file_has_the_mode_of_a_new_one(tmp_path, umask):
    write_json(tmp_path / "a.json", {})
    write_safetensors({"a": torch.zeros(1)}, tmp_path / "new" / "a.safetensors")
    private = tmp_path / "b.safetensors"
    private.touch(0o600)
    with replace_file(private) as fresh:
        save_file({"a": torch.zeros(1)}, fresh)
    assert_follow(tmp_path, umask)


def test_a_copied_folder_has_modes_of_its_own(tmp_path, umask):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "in").mkdir(parents=True)
    for name in ("a.json", "in/b.json", "in/c.safetensors"):
        (source / name).write_text(name)
        (source / name).chmod(0o400)
    (source / "in").chmod(0o500)
    copy_folder(source, target, without="*.safetensors")
    (source / "in").chmod(0o700)
    assert sorted(f.name for f in target.rglob("*.*")) == ["a.json", "b.json"]
    assert (target / "in" / "b.json").read_text() == "in/b.json"
    assert_follow(target, umask)


@pytest.mark.parametrize(
    "umask",
    [0o002, *(pytest.param(other, marks=pytest.mark.slow) for other in (0o022, 0o077))],
    indirect=True,
    ids=oct,
)
def test_all_that_a_run_writes(tmp_path, umask, monkeypatch):
    monkeypatch.setenv("PCPO_CACHE", str(tmp_path / "cache"))
    root, lora = tmp_path / "run", tmp_path / "loras" / "mine.safetensors"
    words = ["train", "--preset", "demo", "--out", str(root), *TINY, "--run.publish", str(lora)]
    assert main(words) == 0
    assert main(["export", str(root), "--out", str(tmp_path / "half.safetensors")]) == 0
    assert {file.name for file in root.rglob("*")} >= {"state.safetensors", "report.html"}
    assert lora.exists() and any((tmp_path / "cache").rglob("*.safetensors"))
    assert_follow(tmp_path, umask)
