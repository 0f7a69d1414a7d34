"""A run that is to stop now ends within its iteration, loses no finished one, and goes on to the
same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.errors import Stopped
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run import start
from comfyui_pcpo.trainers.run.control import Control
from comfyui_pcpo.trainers.run.update.learner import Learner

SMALL = {
    "run": {"iterations": 4, "save_every": 4, "micro_batch": 2, "eval_prompts": 2, "eval_steps": 2},
    "prompts": {"per_iteration": 2, "images_per_prompt": 4},
    "sampler": {"steps": 3},
}
IMAGES, PAIRS = 8 // 2, 8 * 3 // 2
"""Micro-batches of an iteration: sampled, and trained if all steps are."""


def config_of(**changes: dict) -> TrainConfig:
    values = read_preset("demo").model_dump(mode="json")
    for given in (SMALL, {"method": {"selection": "all"}}, changes):
        for section, fields in given.items():
            values[section] |= fields
    return validate(values, "a test")


def stopped_at(monkeypatch, config: TrainConfig, root: Path, call: int) -> int:
    """Ask to stop now before the nth look; returns how often weights were changed."""
    looks, steps, look, step = [], [], Control.stop_now, Learner.step

    def looking(self: Control, number: int | None = None) -> None:
        looks.append(number)
        if len(looks) == call:
            write_json(self.folder.root / "control.json", {"request": "stop_now"})
        look(self, number)

    def stepping(*given):
        steps.append(given)
        return step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(Control, "stop_now", looking)
        patched.setattr(Learner, "step", stepping)
        with pytest.raises(Stopped, match="stopped as asked"):
            start.train(config, root)
    assert JobFolder(root).request() is None and JobFolder(root).state()["state"] == "stopped"
    return len(steps)


def export(root: Path) -> bytes:
    return (root / "lora" / "pcpo_00004.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "call", "steps", "kept"),
    [
        ({}, IMAGES + PAIRS + 2, 2, 1),  # while the second iteration samples
        ({}, 2 * IMAGES + PAIRS + 2, 2, 1),  # while it trains, before its weights change
        ({}, 2 * IMAGES + PAIRS + PAIRS // 2 + 2, 3, 1),  # and after the first of two changes
        ({"run": {"checkpoint_every": 4}}, IMAGES + PAIRS + 2, 2, 1),
        ({"run": {"checkpoint_every": 4}}, 2 * IMAGES + PAIRS + 2, 4, 2),  # its end is waited for
        ({"method": {"update": "one_pass", "selection": "all"}}, IMAGES + 2, 2, 1),
    ],
)
def test_nothing_is_lost_and_the_bytes_are_the_same(
    tmp_path, monkeypatch, changes, call, steps, kept
):
    changes = {**changes, "optimizer": {"updates": 2}, "advantage": {"kind": "group"}}
    config = config_of(**changes)
    start.train(config, tmp_path / "straight")
    assert stopped_at(monkeypatch, config, tmp_path / "cut", call) == steps
    assert [line["iteration"] for line in JobFolder(tmp_path / "cut").metrics()][-1] == kept
    assert (tmp_path / "cut" / "checkpoints" / f"{kept:05}").is_dir()
    start.resume(tmp_path / "cut")
    assert export(tmp_path / "cut") == export(tmp_path / "straight")
