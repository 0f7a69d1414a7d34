"""The tiny SD3.5 and FLUX of a models folder, and what real ComfyUI saves of them, are trained.

Needs PCPO_TINY_MODELS, a models folder with checkpoints/tiny_sd35 and a tiny_flux in three files;
for the saved ones also a ComfyUI checkout, named by COMFYUI_PATH, and a Python that has its
requirements, named by COMFYUI_PYTHON (this one where unset).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures.flow_files_fixture import CONFIG, check_run
from comfyui_pcpo.trainers.cli.command import main
from safetensors.torch import save_file

HOST = os.environ.get("COMFYUI_PATH", "")
MODELS = Path(os.environ.get("PCPO_TINY_MODELS", "/nonexistent"))
SCRIPTS = Path(__file__).parent / "scripts"
FLUX = ("diffusion_models/tiny_flux", "text_encoders/tiny_clip_l", "vae/tiny_ae16")

pytestmark = pytest.mark.skipif(
    not (MODELS / "checkpoints" / "tiny_sd35.safetensors").is_file(),
    reason="PCPO_TINY_MODELS names no folder with tiny_sd35, tiny_flux, tiny_clip_l and tiny_ae16",
)
with_host = pytest.mark.skipif(
    not HOST or not (Path(HOST) / "comfy").is_dir(), reason="COMFYUI_PATH names no ComfyUI checkout"
)


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def train(root: Path, source: Path, *options: str) -> None:
    (root / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    (root / "run.toml").write_text(CONFIG, encoding="utf-8")
    words = ["--model.source", str(source), "--prompts.source", str(root / "prompts.txt")]
    out = ["--out", str(root / "run")]
    assert main(["train", str(root / "run.toml"), *words, *options, *out]) == 0


def flux(suffix: str) -> list[Path]:
    """Network, CLIP-L and VAE."""
    return [MODELS / f"{name}{suffix}" for name in FLUX]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_tiny_models_train_and_export(tmp_path, family, suffix):
    if family == "sd3":
        train(tmp_path, MODELS / "checkpoints" / f"tiny_sd35{suffix}")
    else:
        network, clip, vae = map(str, flux(suffix))
        train(tmp_path, Path(network), "--model.text-encoders", clip, "--model.vae", vae)
    check_run(tmp_path / "run", family)


def in_comfyui(script: str, *arguments: object) -> None:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    words = [python, str(SCRIPTS / script), HOST, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@with_host
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_what_comfyui_saves_of_them_trains_and_exports(tmp_path, family, suffix):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "latents": torch.randn(1, 16, 8, 8, generator=generator),
        "sigma": torch.tensor([0.7] if family == "sd3" else 0.7),
        "prompt": torch.tensor(list(b"a red circle"), dtype=torch.uint8),
        "tokens": torch.randn(1, 77, 768, generator=generator),
        "pooled": torch.randn(1, 768, generator=generator),
    }
    inputs, outputs, saved = (tmp_path / f"{n}.safetensors" for n in ("in", "out", "saved"))
    save_file(tensors, inputs)
    if family == "sd3":
        checkpoint = MODELS / "checkpoints" / f"tiny_sd35{suffix}"
        in_comfyui("comfyui_sd3_fixture.py", "predict", checkpoint, inputs, outputs, saved)
    else:  # saved with a LoRA applied
        lora = MODELS / "loras" / "flux_1.safetensors"
        in_comfyui("comfyui_flow_fixture.py", *flux(suffix), lora, inputs, outputs, saved)
    train(tmp_path, saved)
    check_run(tmp_path / "run", family)
    saved.unlink()
