"""A LoRA trained here computes in real ComfyUI what it computed while it was trained.

What it needs is in comfyui_fixture.py. Where there are no tiny models, a tiny checkpoint is made by
ComfyUI's own classes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_fixture import MODELS, in_comfyui, needs_host, report_in
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.lora import adapters
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_host_fixture.py"
PROMPT = "a red circle left of a blue square"

pytestmark = needs_host


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    for suffix in (".safetensors", ".ckpt"):
        if (file := MODELS / "checkpoints" / f"tiny_sd15{suffix}").is_file():
            return file
    path = tmp_path_factory.mktemp("comfyui") / "tiny_sd15.ckpt"
    in_comfyui(SCRIPT, "write", path)
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
        adapters.add_lora(family.network, 4, 6, family.lora_targets, seed=1)
        layers = list(adapters.adapters(family.network))
        for _, layer in layers:
            weight = layer.lora_B["default"].weight
            weight.normal_(std=0.05, generator=generator)
        expected = family.predict(*parts)
    names = ("lora", "inputs", "outputs", "merged")
    paths = [tmp_path / f"{name}.safetensors" for name in names]
    adapters.export_lora(family.network, paths[0])
    save_file(inputs, paths[1])
    report = report_in(in_comfyui(SCRIPT, "run", checkpoint, *paths))

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
