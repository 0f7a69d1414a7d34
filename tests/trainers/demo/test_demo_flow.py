"""The shipped flow model: its files, its architecture, how it is made, and how good it is."""

from __future__ import annotations

import json
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_pcpo.pcpo import scenes
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.trainers.config.sections import SamplerConfig
from comfyui_pcpo.trainers.config.train_config import DEMO_FLOW_FOLDER, DEMO_FOLDER
from comfyui_pcpo.trainers.demo import __main__ as recipe
from comfyui_pcpo.trainers.demo import flow
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.run.plans import looking_plan
from comfyui_pcpo.trainers.run.sampler import Policy, Request, Sampler
from diffusers import AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

NETWORK = "transformer/diffusion_pytorch_model.safetensors"
FILES = {NETWORK, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
MB = 1_000_000


@pytest.fixture(scope="module")
def family():
    return load_family(DEMO_FLOW_FOLDER)


@pytest.fixture(scope="module")
def narrow() -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(DEMO_FOLDER / "vae", local_files_only=True).eval()


def drawings(count: int) -> torch.Tensor:
    rng, held_out = np.random.default_rng(5), scenes.split().training
    drawn = np.stack([scenes.draw(held_out[i], rng) for i in range(count)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


# --- files ---------------------------------------------------------------------------------------


def test_folders_are_small_and_hold_only_what_is_loaded():
    files = [file for file in DEMO_FLOW_FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".txt", ".safetensors"}
    found = {f.relative_to(DEMO_FLOW_FOLDER).as_posix() for f in files}
    assert {name for name in found if name.endswith(".safetensors")} == FILES
    everything = [f for f in DEMO_FLOW_FOLDER.parent.rglob("*") if f.is_file()]
    assert sum(file.stat().st_size for file in everything) <= 32 * MB


@pytest.mark.parametrize("name", sorted(FILES))
def test_weights_are_half_precision_and_finite(name):
    tensors = load_file(DEMO_FLOW_FOLDER / name)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_configs_name_no_machine():
    for file in DEMO_FLOW_FOLDER.rglob("*.json"):
        text = file.read_text("utf-8")
        assert "_name_or_path" not in text, file
        assert not re.search(r'"(/|[A-Za-z]:\\|~)\w', text), file


# --- architecture --------------------------------------------------------------------------------


def test_width_is_one_that_comfyui_reads_the_depth_off():
    config = json.loads((DEMO_FLOW_FOLDER / "transformer" / "config.json").read_text("utf-8"))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert width == 64 * config["num_layers"] == config["caption_projection_dim"]
    assert config["attention_head_dim"] == 64 and config["in_channels"] == 16
    assert config["qk_norm"] == "rms_norm" and config["patch_size"] == 2


def test_it_is_whole_with_its_one_text_encoder(family, caplog):
    assert family.name == "sd3" and not caplog.records
    assert family.native_resolution == (64, 64)
    embeds = family.encode(["a red circle", ""])
    assert embeds.tokens.shape == (2, 24, 64) and embeds.pooled.shape == (2, 64)
    assert family.schedule.shift == 3.0


def test_every_sentence_of_the_grammar_fits(family):
    rng = np.random.default_rng(0)
    told = [scenes.describe(scene, rng) for scene in scenes.split().training]
    assert max(map(family.prompt_length, told)) <= family.max_prompt_length


def test_diffusers_reads_it_and_predicts_the_same(family):
    without = dict.fromkeys(["text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"])
    pipe = StableDiffusion3Pipeline.from_pretrained(
        DEMO_FLOW_FOLDER, torch_dtype=torch.float32, local_files_only=True, **without
    )
    ids = pipe.tokenizer(["a red circle"], padding="max_length", return_tensors="pt").input_ids
    out = pipe.text_encoder(ids, output_hidden_states=True)
    ours = family.encode(["a red circle"])
    torch.testing.assert_close(out.hidden_states[-2], ours.tokens)
    torch.testing.assert_close(out.text_embeds, ours.pooled)
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipe.transformer(
        hidden_states=x,
        timestep=torch.tensor([600.0]),
        encoder_hidden_states=out.hidden_states[-2],
        pooled_projections=out.text_embeds,
        return_dict=False,
    )[0]
    torch.testing.assert_close(family.predict(x, torch.tensor(0.6), ours), theirs)


# --- how good it is ------------------------------------------------------------------------------


def score(family, noise: float) -> float:
    prompts = list(scenes.split().held_out)
    plan = looking_plan(family, (16, 8, 8), 10, noise, SamplerConfig(transition="flow_sde"))
    embeds = family.encode(prompts)
    policy = Policy(family, torch.no_grad, 1.0, "both", embeds[:1])
    sampler = Sampler(policy, plan.to("cpu"), embeds, (16, 8, 8), 64, torch.device("cpu"), {})
    sampled = sampler([Request(i, ("test", i)) for i in range(len(prompts))])
    return load_reward("scene").score(sampled.images, prompts).values.mean().item()


def test_it_has_learnt_and_has_room_to_improve(family):
    assert 0.25 < score(family, 1.0) < 0.6


def test_it_does_worse_with_another_prompt(family, monkeypatch):
    right, encode = score(family, 1.0), family.encode
    monkeypatch.setattr(family, "encode", lambda prompts: encode(prompts[1:] + prompts[:1]))
    assert score(family, 1.0) < right - 0.1


# --- how it is made ------------------------------------------------------------------------------


def test_spread_latents_are_the_same_ones_in_16_channels(narrow):
    wide, x = flow.spread(narrow), drawings(16)
    with torch.no_grad():
        z4, z16 = narrow.encoder(x), wide.encoder(x)
        error = (wide.decoder(z16) - x).abs().mean()
        before = (narrow.decoder(z4) - x).abs().mean()
    mixed = torch.einsum("oi,bihw->bohw", flow.frame() / 2, z4)
    torch.testing.assert_close(z16, mixed, atol=1e-5, rtol=1e-5)
    assert error < 1.15 * before
    shipped = load_family(DEMO_FLOW_FOLDER).vae
    for name, value in wide.state_dict().items():
        torch.testing.assert_close(shipped.state_dict()[name], value.half().float())


def test_frame_is_orthogonal():
    torch.testing.assert_close(flow.frame().T @ flow.frame(), 16 * torch.eye(4))


def test_text_encoder_goes_on_from_the_other_demo_models():
    start = CLIPTextModel.from_pretrained(DEMO_FOLDER / "text_encoder", local_files_only=True)
    model = flow.new_text_encoder(start)
    words = CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
    ids = words(
        ["a red circle"], padding="max_length", max_length=flow.POSITIONS, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        old = start.float()(ids, output_hidden_states=True).hidden_states[-1]
        new = model(ids, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(new, old)


def test_network_begins_with_the_prediction_zero():
    network: SD3Transformer2DModel = flow.new_transformer()
    x, text, pooled = torch.randn(2, 16, 8, 8), torch.randn(2, 24, 64), torch.randn(2, 64)
    out = network(
        hidden_states=x,
        timestep=torch.tensor([1.0, 900.0]),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    assert out.shape == x.shape and (out == 0).all()


SHORT = [
    *("--latents", "64", "--steps", "2", "--careful-steps", "1", "--batch", "4"),
    *("--evaluate-every", "1"),
]


def test_recipe_goes_on_where_it_was_stopped_and_ships(tmp_path, monkeypatch, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    monkeypatch.setattr(flow.FlowRecipe, "evaluate", lambda *_: "score 0.25")
    assert recipe.main(["flow", "--work", str(straight), *SHORT]) == 0
    stopped.mkdir()
    shutil.copy(straight / "flow_latents.safetensors", stopped)

    def interrupted(*_: object) -> str:
        if (stopped / "flow" / "1").exists():
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(flow.FlowRecipe, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(["flow", "--work", str(stopped), *SHORT])
    monkeypatch.setattr(flow.FlowRecipe, "evaluate", lambda *_: "score 0.25")
    assert recipe.main(["flow", "--work", str(stopped), *SHORT]) == 0
    first, second, third = (
        load_file(work / "flow" / step / NETWORK)
        for work, step in ((straight, "2"), (stopped, "2"), (straight, "1"))
    )
    assert all((first[key] == second[key]).all() for key in first)
    assert any((first[key] != third[key]).any() for key in first)

    assert recipe.main(["flow", "--work", str(stopped), *SHORT, "--careful-steps", "0"]) == 1
    assert "careful_steps 1 (now 0)" in capsys.readouterr().err
    to = tmp_path / "tiny"
    chosen = ["--model", "flow", "--step", "2", "--to", str(to)]
    assert recipe.main(["ship", "--work", str(straight), *chosen]) == 0
    assert load_family(to).encode([""]).tokens.shape == (1, 24, 64)


def test_careless_captions_come_last():
    light = torch.tensor([False, True] * 8)
    data = flow.Latents(torch.zeros(16, 16, 8, 8).half(), torch.arange(16), light)
    nothing: Any = None
    made = flow.FlowRecipe(nothing, data, nothing, nothing)
    settings = flow.FlowSettings(batch=200, careful_steps=10)

    def rows(step: int) -> torch.Tensor:
        return made._rows(step, settings, torch.Generator().manual_seed(step))

    assert not light[rows(9)].any() and light[rows(10)].any() and (~light[rows(10)]).any()
