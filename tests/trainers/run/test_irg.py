"""Implicit Reward Guidance on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_pcpo.tests.fixtures import flux_fixture
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import DEMO_FLOW_FOLDER, DEMO_FOLDER, ConfigError
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.errors import ModelError
from comfyui_pcpo.trainers.lora import adapters
from comfyui_pcpo.trainers.run import irg
from comfyui_pcpo.trainers.run.sampler import Policy
from safetensors.torch import load_file, save_file

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
        adapters.load_lora(tuned.network, file)
        difference = policy_of(tuned, scale)(x, timestep, embeds) - reference
        assert difference.abs().max() > 1e-2
        expected = expected + gamma * difference
    pairs = list(zip((SCENE, BUSY), gammas, strict=True))
    found = irg.guide(policy_of(load_family(DEMO_FOLDER), scale), pairs)(x, timestep, embeds)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def random_lora(network, path: Path, seed: int, rank: int) -> Path:
    """A file that changes every second linear layer."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, layer in layers[seed % 2 :: 2]:
        down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
        up = 0.1 * torch.randn(layer.out_features, rank, generator=generator)
        named = {"lora_A.weight": down, "lora_B.weight": up, "alpha": torch.tensor(1.5)}
        tensors |= {f"transformer.{name}.{part}": value for part, value in named.items()}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_every_layer_of_the_flow_families_knows_its_rows(tmp_path, kind):
    flux = tmp_path / "flux"
    folder = DEMO_FLOW_FOLDER if kind == "sd3" else flux_fixture.write_folder(flux)
    family = load_family(folder)
    x = torch.randn(2, *family.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    sigma, embeds = torch.tensor(0.7), family.encode(["a red circle", "a blue box"])
    expected = reference = policy_of(family, 3.0)(x, sigma, embeds)
    pairs = [
        (random_lora(family.network, tmp_path / f"{i}.safetensors", i, 2 + i), 0.5 - i)
        for i in range(2)
    ]
    for file, gamma in pairs:
        tuned = load_family(folder)
        adapters.load_lora(tuned.network, file)
        difference = policy_of(tuned, 3.0)(x, sigma, embeds) - reference
        assert difference.abs().max() > 1e-2
        expected = expected + gamma * difference
    found = irg.guide(policy_of(family, 3.0), pairs)(x, sigma, embeds)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


class Passes:
    """A family whose passes are counted, and fail where they have more rows than fit."""

    def __init__(self, family, most=1000):
        self.family, self.most, self.rows = family, most, []

    def __getattr__(self, name):
        return getattr(self.family, name)

    def predict(self, x, timestep, embeds):
        if len(x) > self.most:
            raise torch.OutOfMemoryError
        self.rows.append(len(x))
        return self.family.predict(x, timestep, embeds)


def test_all_versions_are_one_pass_and_gamma_0_costs_nothing():
    family = Passes(load_family(DEMO_FOLDER))
    x, embeds = torch.randn(2, 4, 8, 8), family.encode(["a red circle", "a green ball"])
    pairs = [(SCENE, 0.5), (BUSY, 0.0), (BUSY, 0.5)]
    led = irg.guide(policy_of(family, 3.0), pairs)
    led(x, torch.tensor(501), embeds)
    replace(led, shares_negative=True)(x, torch.tensor(501), embeds)
    replace(led, guidance_scale=1.0)(x, torch.tensor(501), embeds)
    assert family.rows == [2 * 3 * 2, 2 * (2 + 2), 2 * 3]


def test_the_negative_prompt_by_the_base_alone():
    family = load_family(DEMO_FOLDER)
    x, timestep, embeds = torch.randn(1, 4, 8, 8), torch.tensor(501), family.encode(["a ball"])
    base = policy_of(family, 4.0)(x, timestep, embeds)
    plain = policy_of(family)(x, timestep, embeds)
    led = irg.guide(policy_of(family), [(SCENE, 0.7)])
    change = led(x, timestep, embeds) - plain
    shared = replace(led, guidance_scale=4.0, shares_negative=True)(x, timestep, embeds)
    torch.testing.assert_close(shared, base + change, atol=2e-5, rtol=0)
    exact = replace(led, guidance_scale=4.0)(x, timestep, embeds)
    assert (exact - shared).abs().max() > 1e-2


def test_where_memory_is_short_fewer_images_are_in_a_pass():
    family = Passes(load_family(DEMO_FOLDER))
    x, timestep = torch.randn(5, 4, 8, 8), torch.tensor([900, 501, 300, 20, 1])
    embeds = family.encode([f"{i} circles" for i in range(5)])
    led = irg.guide(policy_of(family), [(SCENE, 0.5)])
    expected, family.most = led(x, timestep, embeds), 3
    for _ in range(2):
        torch.testing.assert_close(led(x, timestep, embeds), expected, atol=2e-5, rtol=0)
    assert family.rows == [10, *[2] * 10]  # of two versions each
    family.most = 1
    with pytest.raises(torch.OutOfMemoryError):
        led(x, timestep, embeds)


def test_a_lora_of_another_model_is_refused(tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    tensors = load_file(SCENE)
    key = next(key for key in tensors if key.endswith("lora_down.weight"))
    save_file(tensors | {key: tensors[key][:, :-1].contiguous()}, wrong)
    with pytest.raises(ModelError, match="it was made for another base model"):
        irg.guide(policy_of(load_family(DEMO_FOLDER)), [(wrong, 0.0)])


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
    assert main(["sample", "--share-negative"]) == 2
    assert "--share-negative is of --irg" in capsys.readouterr().err
