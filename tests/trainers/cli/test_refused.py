"""What cannot be run is one clear line, exit code 2, at once, with nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures.refused_fixture import LONGEST_S, refused, refused_here
from comfyui_pcpo.trainers.config.train_config import DEMO_FOLDER, TrainConfig
from comfyui_pcpo.trainers.job.folder import JobFolder
from huggingface_hub import constants
from safetensors.torch import save_file

FLUX = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": torch.zeros(4, 4)}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with everything that is at fault in one of the cases."""
    (tmp_path / "typo.toml").write_text("[method]\ncredits = 'native'\n")
    (tmp_path / "broken.toml").write_text("[method\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("ein grüner Kreis\n".encode("latin-1"))
    (tmp_path / "no_prompt.jsonl").write_text('{"caption": "a red circle"}\n')
    (tmp_path / "file").write_text("")
    save_file(FLUX, tmp_path / "flux.safetensors")
    whole = (DEMO_FOLDER / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 1000)
    (tmp_path / "noise.ckpt").write_bytes(b"\xff" * 1000)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "job.json").write_text("{}")
    return tmp_path


DEMO = ("train", "--preset", "demo")
AT_ONCE = {
    "no preset": (("train", "--preset", "dmeo"), "no preset 'dmeo'; choose one of demo"),
    "no file": (("train", "my.toml"), "no config file my.toml; give"),
    "no toml": (("train", "broken.toml"), "broken.toml is not TOML"),
    "no field": (("train", "typo.toml"), "method.credits"),
    "range": ((*DEMO, "--optimizer.lr", "-1"), "optimizer.lr"),
    "nan": ((*DEMO, "--optimizer.lr", "nan"), "optimizer.lr"),
    "no device": ((*DEMO, "--run.device", "cuda:1"), "run.device"),
    "ode": ((*DEMO, "--sampler.noise-level", "0"), "sampler.noise_level is 0"),
    "density": ((*DEMO, "--method.ratio", "density"), "set method.credit to 'native'"),
    "window": (
        (*DEMO, "--method.selection", "sliding_window", "--sampler.steps", "1"),
        "'sliding_window', but 1 step is trained",
    ),
    "no reward": ((*DEMO, "--rewards", "beauty", "1"), "the reward 'beauty'"),
    "half a reward": ((*DEMO, "--rewards", "scene"), "NAME WEIGHT"),
    "preset without its model": (
        ("train", "--preset", "sd14-hpsv21-full"),
        "Stable Diffusion 1.4",
    ),
    "reward of another name": (
        (*DEMO, "--reward-options", "scene.name=beauty"),
        "the reward 'beauty' (rewards.scene.name)",
    ),
    "no model": ((*DEMO, "--model.source", "gone.safetensors"), "no model at gone.safetensors"),
    "flux": ((*DEMO, "--model.source", "flux.safetensors"), "FLUX"),
    "cut off": ((*DEMO, "--model.source", "cut.safetensors"), "cut.safetensors"),
    "noise": ((*DEMO, "--model.source", "noise.safetensors"), "noise.safetensors"),
    "noisy pickle": ((*DEMO, "--model.source", "noise.ckpt"), "noise.ckpt is damaged"),
    "no lora": ((*DEMO, "--trainable.init-lora", "gone.safetensors"), "trainable.init_lora"),
    "no prompts": ((*DEMO, "--prompts.source", "gone.txt"), "neither a file nor a built-in set"),
    "empty prompts": ((*DEMO, "--prompts.source", "empty.txt"), "holds no prompt"),
    "latin prompts": ((*DEMO, "--prompts.source", "latin.txt"), "is not UTF-8 text (byte 6)"),
    "no prompt": ((*DEMO, "--prompts.source", "no_prompt.jsonl"), "no_prompt.jsonl, line 1"),
    "their prompts": ((*DEMO, "--prompts.source", "hpdv2"), "a set that is not shipped"),
    "used": ((*DEMO, "--out", "used"), "holds a run already"),
    "out is a file": ((*DEMO, "--out", "file"), "file is no folder"),
    "out in a file": ((*DEMO, "--out", "file/run"), "file is no folder"),
    "nothing to resume": (("resume", "gone"), "gone holds no run"),
    "broken job": (("resume", "used"), "job.json cannot be read"),
    "nothing to list": (("jobs", "list", "gone"), "no folder gone"),
    "nothing to stop": (("jobs", "stop", "gone"), "gone holds no run"),
}


@pytest.mark.parametrize("case", AT_ONCE)
def test_refused_at_once(folder, case):
    words, said = AT_ONCE[case]
    line, is_loaded, seconds = refused(folder, *words)
    assert said in line
    assert not is_loaded
    assert seconds < LONGEST_S


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_folder_that_cannot_be_written_to(folder):
    (folder / "used").chmod(0o500)
    assert "cannot be written to" in refused(folder, *DEMO, "--out", "used/run")[0]


def test_folder_that_cannot_be_written_to_as_root(monkeypatch, tmp_path):
    """The same where the tests run as root, to whom the system allows everything."""
    from comfyui_pcpo.trainers.config.train_config import ConfigError
    from comfyui_pcpo.trainers.job import preflight

    monkeypatch.setattr(preflight.os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"{tmp_path.name} cannot be written to; choose another"):
        preflight.check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


# --- what only the model's own files tell --------------------------------------------------------


def test_checkpoint_with_objects(folder):
    weights = {"weight": torch.arange(3.0)}
    torch.save({"state_dict": weights, "callback": Path("x")}, folder / "objects.ckpt")
    line, *_ = refused(folder, *DEMO, "--model.source", "objects.ckpt")
    assert "objects.ckpt is no model known here (it begins with weight)" in line


def test_prompt_longer_than_the_tokenizer(folder, capsys, monkeypatch):
    (folder / "long.txt").write_text("a red circle\n" + "red " * 80)
    options = ("--prompts.source", "long.txt", "--rewards", "jpeg_compressibility", "1")
    line = refused_here(folder, capsys, monkeypatch, *DEMO, *options)
    assert "82 tokens and the model takes 77" in line and "red red" in line


def test_adapters_of_layers_that_the_network_lacks(folder, capsys, monkeypatch):
    options = ("--trainable.targets", "to_q", "to_x")
    line = refused_here(folder, capsys, monkeypatch, *DEMO, *options)
    assert "trainable.targets: the target 'to_x' matches no module of the network" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hps_v2_1", "1"), "trainers rewards get hps_v2_1`"),
        (("ocr", "1"), "the reward 'ocr' cannot judge the prompt"),
        (("remote", "1", "--reward-options", "remote.url=http://127.0.0.1:9"), "cannot be used"),
        (("remote", "1", "--reward-options", "remote.url=file:///etc"), "rewards.remote: the url"),
    ],
)
def test_rewards_that_cannot_be_had(folder, words, said, capsys, monkeypatch):
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    assert said in refused_here(folder, capsys, monkeypatch, *DEMO, "--rewards", *words)


def test_folder_in_use(folder):
    run = JobFolder(folder / "held")
    run.start({"config": TrainConfig().model_dump(mode="json")})
    with run.hold():
        line, is_loaded, _ = refused(folder, "resume", "held")
    assert "held is in use by process" in line and not is_loaded
