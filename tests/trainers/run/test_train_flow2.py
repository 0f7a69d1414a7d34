"""Training of Z-Image and FLUX.2 [klein], on tiny random models: updates, resume, exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flow_layouts_fixture as flow_layouts
from comfyui_pcpo.tests.fixtures import klein_fixture, zimage_fixture
from comfyui_pcpo.tests.fixtures.flux_fixture import save
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.lora import adapters
from diffusers import Flux2KleinPipeline, ZImagePipeline
from safetensors import safe_open
from safetensors.torch import load_file

ANY = flow_layouts.LAYOUTS["zimage"]["ai-toolkit's"]
FIXTURES = {"zimage": zimage_fixture, "klein": klein_fixture}
SMALL = """
rewards = { jpeg_incompressibility = 1.0 }
model = { width = 64, height = 64 }
sampler = { transition = "flow_sde", noise_level = 0.7, steps = 3, drop_last = 1 }
advantage = { kind = "group" }
prompts = { per_iteration = 2, images_per_prompt = 2 }
optimizer = { lr = 1e-2 }
run = { iterations = 2, micro_batch = 2, save_every = 1, eval_prompts = 1, eval_steps = 2 }
"""
KINDS = {
    "plain": "--sampler.grid inverse_count",
    "guided": "--sampler.guidance-scale 3 --sampler.negative-prompt ugly,and,longer,than,others",
    "kl": "--method.kl-weight 0.01 --sampler.guidance-scale 3 "
    "--sampler.guidance-gradient conditional --model.gradient-checkpointing",
    "cps": "--sampler.transition cps --sampler.noise-level 0.8 --method.kl-weight 0.01",
    "a window that moves": "--method.selection sliding_window --method.window 1 "
    "--method.window-move random --model.offload blocks",
    "window": "--method.selection sliding_window --method.window 1 --model.base fp8",
}
PROMPTS = "a cat\na red circle left of a blue square and a green one\na dog\n"


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {
        "zimage": zimage_fixture.write_folder(made / "z-image", vae="tiny"),
        "klein": klein_fixture.write_folder(made / "klein-base"),
    }


def train(model: Path, root: Path, options: str) -> JobFolder:
    prompts, config = root.with_suffix(".txt"), root.with_suffix(".toml")
    prompts.write_text(PROMPTS, encoding="utf-8")
    config.write_text(SMALL, encoding="utf-8")
    files = ["--model.source", str(model), "--prompts.source", str(prompts), "--out", str(root)]
    assert main(["train", str(config), *files, *options.split()]) == 0
    return JobFolder(root)


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_exactly_on_policy(models, tmp_path, name, kind):
    run = train(models[name], tmp_path / "run", KINDS[kind])
    for line in run.metrics():
        assert line["log_ratio_max_on_policy"] == 0 and line["grad_norm"] > 0
    exported = load_file(run.last_export())
    prefix = {"zimage": "diffusion_model.", "klein": "transformer."}[name]
    assert all(key.startswith(prefix) for key in exported)
    assert any(key.endswith(".alpha") for key in exported) == (name == "zimage")
    with safe_open(run.last_export(), "pt") as file:
        about = file.metadata()
    assert about["ss_base_model_version"] == {"zimage": "zimage", "klein": "flux2_klein_4b"}[name]
    modules = {re.sub(r"\.\d+\.", ".N.", key.rpartition(".lora_")[0]) for key in exported}
    assert f"{prefix}layers.N.attention.to_q" in modules or name == "klein"
    single = f"{prefix}single_transformer_blocks.N.attn"
    assert {f"{single}.to_out", f"{single}.to_qkv_mlp_proj"} <= modules or name == "zimage"


@pytest.mark.parametrize("name", FIXTURES)
def test_one_pass_is_two_passes(models, tmp_path, name):
    settings = "--run.iterations 1 --optimizer.updates 1"
    exports = [
        load_file(
            train(models[name], tmp_path / way, f"{settings} --method.update {way}").last_export()
        )
        for way in ("one_pass", "two_pass")
    ]
    assert exports[0].keys() == exports[1].keys()
    for key, tensor in exports[0].items():
        torch.testing.assert_close(tensor, exports[1][key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_resumed_run_writes_the_same_bytes(models, tmp_path, name):
    whole = train(models[name], tmp_path / "whole", "")
    part = train(models[name], tmp_path / "part", "--run.iterations 1")
    assert main(["resume", str(part.root), "--iterations", "2"]) == 0
    assert part.last_export().read_bytes() == whole.last_export().read_bytes()


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("alpha", [4, 8])
def test_an_export_has_the_same_strength_in_diffusers(models, tmp_path, name, alpha):
    family = load_family(models[name])
    adapters.add_lora(family.network, 4, alpha, family.lora_targets, seed=0)
    for _, layer in adapters.adapters(family.network):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    path = adapters.export_lora(family.network, tmp_path / "lora.safetensors")
    embeds, sigma = family.encode(["a cat", "a dog"]), torch.tensor(0.7)
    x = torch.randn(2, *family.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = family.predict(x, sigma, embeds)
    base = load_family(models[name])
    kind = {"zimage": ZImagePipeline, "klein": Flux2KleinPipeline}[name]
    pipeline = kind(None, base.vae, None, None, base.network)
    pipeline.load_lora_weights(str(path))
    with torch.no_grad():
        theirs = base.predict(x, sigma, embeds)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-4)
    again = load_family(models[name])
    adapters.load_lora(again.network, path)
    with torch.no_grad():
        torch.testing.assert_close(again.predict(x, sigma, embeds), ours, atol=1e-5, rtol=1e-4)
        pipeline.unload_lora_weights()
        assert (base.predict(x, sigma, embeds) - ours).abs().max() > 1e-3


def test_a_distilled_model_is_refused_and_trained_if_that_is_wanted(tmp_path, capsys):
    turbo = zimage_fixture.write_folder(tmp_path / "Z-Image-Turbo", vae="tiny", shift=3.0)
    (tmp_path / "p.txt").write_text(PROMPTS)
    (tmp_path / "c.toml").write_text(SMALL)
    command = ["train", str(tmp_path / "c.toml"), "--model.source", str(turbo)]
    command += ["--prompts.source", str(tmp_path / "p.txt"), "--out", str(tmp_path / "run")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "Z-Image-Turbo is distilled to a few steps, by its name: it" in said
    assert "Train Z-Image and try its LoRA" in said and "model.train_distilled" in said
    assert not (tmp_path / "run").exists()
    klein = klein_fixture.write_folder(tmp_path / "mine", is_distilled=True)
    assert main([*command[:3], str(klein), *command[4:]]) == 2
    assert "Train FLUX.2 [klein] base 4B" in capsys.readouterr().err
    assert main([*command, "--model.train-distilled", "--run.iterations", "1"]) == 0


def qwen(fixture: Any, folder: Path, to: Path, width: int) -> Path:
    tensors = fixture.parts(folder)["qwen"]
    tensors["model.layers.0.post_attention_layernorm.weight"] = torch.ones(width)
    return save(tensors, to)


@pytest.mark.parametrize(
    ("name", "mistake", "said"),
    [
        ("zimage", "vae 32", "has 32 latent channels and the network takes 16: .* (FLUX.1's: ae."),
        ("klein", "vae 16", "has 16 latent channels and the network takes 32: .* give FLUX.2's"),
        ("zimage", "qwen 4096", "holds Qwen3-8B: Z-Image and FLUX.2 [klein] 4B take Qwen3-4B"),
        ("klein", "qwen 1024", "holds Qwen3-0.6B: Z-Image and FLUX.2 [klein] 4B take Qwen3-4B"),
        ("zimage", "cut", "cut.safetensors is not a complete safetensors file"),
        ("klein", "width 72", "width is 72; it must be a multiple of 16, for example 64"),
        (
            "zimage",
            "prompt 600",
            "and the model takes 512; shorten it, or the end would be trained",
        ),
        ("klein", "lora", "it was made for Z-Image"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(
    models, tmp_path, capsys, name, mistake, said
):
    fixture, (kind, _, number) = FIXTURES[name], mistake.partition(" ")
    network = save(fixture.whole(models[name]), tmp_path / "whole-base.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(network.read_bytes()[:-9])
    prompts, config = tmp_path / "prompts.txt", tmp_path / "config.toml"
    prompts.write_text("a " * int(number) if kind == "prompt" else PROMPTS, encoding="utf-8")
    config.write_text(SMALL, encoding="utf-8")
    vae = save(
        {"decoder.conv_in.weight": torch.zeros(8, int(number) if kind == "vae" else 1, 3, 3)},
        tmp_path / "vae.safetensors",
    )
    lora = save(flow_layouts.write("zimage", ANY)[0], tmp_path / "lora.safetensors")
    options = {
        "vae": ["--model.vae", str(vae)],
        "width": ["--model.width", number],
        "lora": ["--trainable.init-lora", str(lora)],
    }.get(kind, [])
    if kind == "qwen":
        file = qwen(fixture, models[name], tmp_path / "qwen.safetensors", int(number))
        options = ["--model.text-encoders", str(file)]
    source = cut if kind == "cut" else network
    files = ["--model.source", str(source), "--model.qwen-tokenizer", f"{models[name]}/tokenizer"]
    files += ["--prompts.source", str(prompts), "--out", str(tmp_path / "run")]
    assert main(["train", str(config), *files, *options]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert all(part in shown for part in said.split(" .* ")), shown
    assert not (tmp_path / "run").exists()
