"""Implicit Reward Guidance on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfyui_pcpo.trainers import irg, lora
from comfyui_pcpo.trainers.cli import main
from comfyui_pcpo.trainers.config import DEMO_FOLDER, ConfigError
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.policy import Policy
from safetensors.torch import load_file

LORAS = DEMO_FOLDER.parent / "loras"
SCENE, BUSY = LORAS / "scene.safetensors", LORAS / "jpeg_incompressibility.safetensors"


def policy_of(family, scale=1.0) -> Policy:
    return Policy(family, torch.no_grad, scale, "both", family.encode([""]))


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_the_sum_of_separate_networks(scale):
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep, gammas = torch.tensor(501), [0.7, -0.4]
    base = load_family(DEMO_FOLDER)
    embeds = base.encode(["a red circle", "a blue box above a cyan plus", "a green ball"])
    expected = reference = policy_of(base, scale)(x, timestep, embeds)
    for file, gamma in zip((SCENE, BUSY), gammas, strict=True):
        tuned = load_family(DEMO_FOLDER)
        lora.load_lora(tuned.network, file)
        difference = policy_of(tuned, scale)(x, timestep, embeds) - reference
        assert difference.abs().max() > 1e-2
        expected = expected + gamma * difference
    pairs = list(zip((SCENE, BUSY), gammas, strict=True))
    found = irg.guided(policy_of(load_family(DEMO_FOLDER), scale), pairs)(x, timestep, embeds)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def latents(tmp_path: Path, name: str, *options: str) -> torch.Tensor:
    file, out = tmp_path / f"{name}.safetensors", tmp_path / name
    words = ["sample", "--limit", "2", "--steps", "3", "--out", str(out), "--latents", str(file)]
    assert main([*words, *options]) == 0
    return load_file(file)["latents"]


def test_sample_with_gamma(tmp_path):
    base = latents(tmp_path, "base")
    torch.testing.assert_close(latents(tmp_path, "zero", "--irg", f"{SCENE}:0"), base)
    loaded = latents(tmp_path, "lora", "--lora", str(SCENE))
    one = latents(tmp_path, "one", "--irg", f"{SCENE}:1")
    torch.testing.assert_close(one, loaded, atol=1e-4, rtol=0)
    assert (one - base).abs().max() > 0.05
    two = latents(tmp_path, "two", "--irg", f"{SCENE}:0.5", f"{BUSY}:0.5")
    assert (two - one).abs().max() > 0.05


def test_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C:my lora.safetensors").write_bytes(b"")
    assert irg.parse_pair("C:my lora.safetensors:-0.5") == (Path("C:my lora.safetensors"), -0.5)
    for text in ("lora.safetensors", "lora.safetensors:", ":1", "a:b", "a:inf", "a:nan"):
        with pytest.raises(ConfigError, match="takes FILE:GAMMA"):
            irg.parse_pair(text)
    assert main(["sample", "--irg", "gone.safetensors:1"]) == 2
    assert "gone.safetensors, which is no file" in capsys.readouterr().err
    assert main(["sample", "--irg", f"{SCENE}:1", "--lora", str(SCENE)]) == 2
    assert "give --lora or --irg" in capsys.readouterr().err
