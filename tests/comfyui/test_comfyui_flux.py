"""What is computed here with FLUX files is what real ComfyUI computes with them.

What it needs is in comfyui_fixture.py; of the tiny models a FLUX in three files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_fixture import MODELS, in_comfyui, needs_host, needs_models
from comfyui_pcpo.trainers.families.embeds import Embeds
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.families.flux import model as flux
from comfyui_pcpo.trainers.families.registry import FAMILIES
from comfyui_pcpo.trainers.lora import adapters, keys
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).parent / "scripts" / "comfyui_flow_fixture.py"
PROMPT = "a red circle left of a blue square"
FULL = {"dtype": torch.float32, "vae_dtype": torch.float32}

pytestmark = [needs_host, needs_models("diffusion_models/tiny_flux.safetensors")]


def paths(suffix: str) -> list[Path]:
    names = ("diffusion_models/tiny_flux", "text_encoders/tiny_clip_l", "vae/tiny_ae16")
    return [MODELS / f"{name}{suffix}" for name in names]


def write_lora(family: flux.Flux, path: Path, generator: torch.Generator) -> int:
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_mlp", "proj_out", "linear")
    adapters.add_lora(family.network, 4, 6, targets, seed=1)
    tensors = {}
    for name, layer in adapters.adapters(family.network):
        up = layer.lora_B["default"].weight
        torch.nn.init.normal_(up, std=0.05, generator=generator)
        names = keys.tensor_names(FAMILIES["flux"], name)
        values = (layer.lora_A["default"].weight, up, torch.tensor(6.0))
        tensors |= {key: value.detach() for key, value in zip(names, values, strict=True)}
    save_file(tensors, path)
    return len(tensors) // 3


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_flux_in_real_comfyui(tmp_path, suffix):
    network, clip, vae = paths(suffix)
    family = flux.load_files(Files(network, (clip,), vae), **FULL)
    generator = torch.Generator().manual_seed(0)
    embeds = family.encode([PROMPT])
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    sigma = torch.tensor(0.7371)
    inputs = {
        "latents": latents,
        "sigma": sigma,
        "tokens": embeds.tokens,
        "pooled": embeds.pooled,
        "prompt": torch.tensor(list(PROMPT.encode()), dtype=torch.uint8),
    }
    files = [tmp_path / f"{name}.safetensors" for name in ("lora", "inputs", "outputs", "saved")]
    save_file(inputs, files[1])
    both = Embeds(embeds.tokens.expand(2, -1, -1), embeds.pooled.expand(2, -1))
    with torch.no_grad():
        base = family.predict(latents, sigma, both)
        count = write_lora(family, files[0], generator)
        tuned = family.predict(latents, sigma, both)
    printed = in_comfyui(SCRIPT, network, clip, vae, *files)
    assert "lora key not loaded" not in printed
    assert "LORA" in printed and count > 20

    theirs = load_file(files[2])
    torch.testing.assert_close(embeds.tokens, theirs["tokens"], rtol=0, atol=1e-4)
    torch.testing.assert_close(embeds.pooled, theirs["pooled"], rtol=0, atol=1e-4)
    torch.testing.assert_close(base, theirs["velocity"], rtol=0, atol=1e-4)
    torch.testing.assert_close(tuned, theirs["tuned"], rtol=0, atol=1e-4)
    assert (tuned - base).abs().max() > 0.05
    images = (theirs["images"] * 255).round().permute(0, 3, 1, 2)
    assert (family.decode(latents).float() - images).abs().max() <= 1

    again = flux.load_files(Files(files[3]), **FULL)  # the three parts and the LoRA in one file
    torch.testing.assert_close(again.predict(latents, sigma, both), tuned, rtol=0, atol=1e-4)
    torch.testing.assert_close(again.encode([PROMPT]).pooled, embeds.pooled, rtol=0, atol=1e-4)
    assert (again.decode(latents).int() - family.decode(latents).int()).abs().max() <= 1
