"""A LoRA trained here computes in real ComfyUI what it computed while it was trained.

Needs a ComfyUI checkout, named by COMFYUI_PATH, and a Python that has its requirements, named by
COMFYUI_PYTHON (this one where unset). PCPO_TINY_MODELS may name a models folder that has
checkpoints/tiny_sd15; else a tiny checkpoint is made by ComfyUI's own classes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.trainers import lora
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from safetensors.torch import load_file, save_file

HOST = os.environ.get("COMFYUI_PATH", "")
SCRIPT = Path(__file__).parent / "comfyui_host_fixture.py"
PROMPT = "a red circle left of a blue square"

pytestmark = pytest.mark.skipif(
    not (Path(HOST) / "comfy").is_dir() or not HOST,
    reason="COMFYUI_PATH names no ComfyUI checkout",
)


def in_comfyui(*arguments: object) -> str:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, str(SCRIPT), HOST, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    models = Path(os.environ.get("PCPO_TINY_MODELS", "/nonexistent")) / "checkpoints"
    for suffix in (".safetensors", ".ckpt"):
        if (models / f"tiny_sd15{suffix}").is_file():
            return models / f"tiny_sd15{suffix}"
    path = tmp_path_factory.mktemp("comfyui") / "tiny_sd15.ckpt"
    in_comfyui("write", path)
    return path


def test_trained_lora_in_real_comfyui(checkpoint, tmp_path):
    family = load_family(checkpoint)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([37.0, 801.0]),
        "embeds": torch.randn(2, 77, 768, generator=generator),
        "prompt": torch.tensor(list(PROMPT.encode()), dtype=torch.uint8),
    }
    parts = (inputs["latents"], inputs["timestep"], Embeds(inputs["embeds"]))
    with torch.no_grad():
        expected_base = family.predict(*parts)
        lora.add_lora(family.network, 4, 6, family.lora_targets, seed=1)
        layers = list(lora.adapters(family.network))
        for _, layer in layers:
            weight = layer.lora_B["default"].weight
            weight.normal_(std=0.05, generator=generator)
        expected = family.predict(*parts)
    names = ("lora", "inputs", "outputs", "merged")
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    lora.export_lora(family.network, paths[0])
    save_file(inputs, paths[1])
    printed = in_comfyui("run", checkpoint, *paths)

    report = json.loads(printed.split("REPORT", 1)[1])
    assert report == {"patches": len(layers), "applied": len(layers), "unmatched": []}
    theirs = load_file(paths[2])
    change = (expected - expected_base).abs().max()
    assert change > 100 * 1e-4  # so that a LoRA that is not applied would show
    torch.testing.assert_close(theirs["base"], expected_base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs["tuned"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        theirs["embeds"], family.encode([PROMPT]).tokens, rtol=1e-4, atol=1e-4
    )
    ours = family.decode(inputs["latents"]).permute(0, 2, 3, 1)
    assert (theirs["images"] * 255 - ours).abs().max() <= 1
    merged = load_family(paths[-1])  # what Save Checkpoint writes of the model with its LoRA
    paths[-1].unlink()
    with torch.no_grad():
        torch.testing.assert_close(merged.predict(*parts), expected, rtol=1e-4, atol=1e-4)
    assert merged.encode([PROMPT]).tokens.equal(family.encode([PROMPT]).tokens)
    assert merged.decode(inputs["latents"]).equal(family.decode(inputs["latents"]))
    for name, ours in (("base", expected_base), ("tuned", expected)):
        print(f"{name}: largest difference {(theirs[name] - ours).abs().max():.1e}")
    print(f"the LoRA changes the prediction by up to {change:.2f}")
