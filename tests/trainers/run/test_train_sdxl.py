"""Training of SDXL, on a tiny random model: both ways to update, zero-SNR, resume, exports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import sdxl_fixture
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.families.files import Files
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.lora import adapters
from safetensors import safe_open
from safetensors.torch import load_file
from warm_fixture import pcpo

SMALL = """
rewards = { jpeg_incompressibility = 1.0 }
model = { width = 64, height = 64 }
sampler = { steps = 4, guidance_scale = 3.0 }
advantage = { kind = "group" }
prompts = { per_iteration = 2, images_per_prompt = 2 }
run = { iterations = 2, micro_batch = 2, save_every = 1, eval_prompts = 2, eval_steps = 2 }
"""
KINDS = {
    "plain": "",
    "zero-snr": "--model.prediction-type v_prediction --model.zero-terminal-snr True",
    "kl": "--method.kl-weight 0.01 --sampler.guidance-gradient conditional",
    "window": "--method.selection sliding_window --method.window 2",
    "drawn-sizes": "--model.size-condition 512 512 0 0 64 64 1024 768 8 0 64 64",
    "sizes": "--model.size-condition 512 512 0 0 64 64 --model.clip-skip 3",
}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    folder = sdxl_fixture.write_folder(made / "sdxl", vae="tiny")
    return sdxl_fixture.write_file(folder, made / "sdxl.safetensors")


def train(model, root, options: str) -> JobFolder:
    prompts, config = root.with_suffix(".txt"), root.with_suffix(".toml")
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    config.write_text(SMALL, encoding="utf-8")
    files = ["--model.source", str(model), "--prompts.source", str(prompts), "--out", str(root)]
    assert main(["train", str(config), *files, *options.split()]) == 0
    return JobFolder(root)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_its_export_is_the_trained_network(model, tmp_path, capsys, kind):
    run = train(model, tmp_path / "run", KINDS[kind])
    small = "64 x 64 px; SDXL draws badly below 768 x 768"
    assert small in capsys.readouterr().out
    for line in run.metrics():
        assert line["log_ratio_max_on_policy"] == 0 and line["grad_norm"] > 0
    export = run.last_export()
    assert all(key.startswith("lora_unet_") for key in load_file(export))
    with safe_open(export, "pt") as file:
        about = file.metadata()
    version = "sdxl_base_v1-0" + ("-v" if kind == "zero-snr" else "")
    assert about["ss_base_model_version"] == version
    assert about["ss_sd_model_name"] == "sdxl.safetensors"
    is_v = str(kind == "zero-snr")
    assert (about["ss_v_parameterization"], about["ss_zero_terminal_snr"]) == (is_v, is_v)
    assert about["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    family = load_family(model)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds, timestep = family.encode(["a cat", "a dog"]), torch.tensor(501)
    with torch.no_grad():
        base = family.predict(x, timestep, embeds)
        adapters.load_lora(family.network, export)
        assert (family.predict(x, timestep, embeds) - base).abs().max() > 1e-6


def test_a_dry_run_says_that_the_images_are_small(model, capsys):
    words = ["train", "--preset", "sdxl-12gb", "--dry-run", "--card-gb", "12"]
    small = ["--model.width", "512", "--model.height", "512"]
    assert main(words) == 0
    assert "draws badly" not in capsys.readouterr().out
    assert main([*words, *small]) == 0
    assert "512 x 512 px; SDXL draws badly below 768 x 768" in capsys.readouterr().out
    assert main([*words, *small, "--model.source", str(model)]) == 0
    assert "512 x 512 px; SDXL draws badly" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["plain", "zero-snr"])
def test_a_whole_network_says_what_it_predicts(model, tmp_path, kind):
    """Empty tensors, which ComfyUI reads beside the original names alone."""
    options = "--trainable.kind full --run.iterations 1"
    export = train(model, tmp_path / "run", f"{options} {KINDS[kind]}").last_export()
    names, marks = load_file(export).keys(), {"v_pred", "ztsnr"}
    if kind == "plain":
        assert not marks & names and "down_blocks.0.resnets.0.conv1.weight" in names
    else:
        assert marks <= names and "input_blocks.1.0.in_layers.2.weight" in names
    family = load_family(Files(export, text_encoders=(model,), vae=model))
    is_v = kind == "zero-snr"
    assert family.schedule.prediction_type == ("v_prediction" if is_v else "epsilon")
    assert family.schedule.rescale_betas_zero_snr == is_v
    base, again = (f.network.state_dict() for f in (load_family(model), family))
    assert all((again[key] - tensor).abs().max() < 1e-3 for key, tensor in base.items())


@pytest.mark.parametrize("kind", ["plain", "drawn-sizes"])
def test_one_pass_is_two_passes(model, tmp_path, kind):
    settings = f"--run.iterations 1 --optimizer.updates 1 {KINDS[kind]}"
    exports = [
        load_file(train(model, tmp_path / way, f"{settings} --method.update {way}").last_export())
        for way in ("one_pass", "two_pass")
    ]
    for key, tensor in exports[0].items():
        assert (tensor - exports[1][key]).abs().max() < 1e-5, key


CHOICES = (512, 512, 0, 0, 64, 64, 1024, 768, 8, 0, 64, 64, 64, 96, 0, 0, 64, 64)


def test_drawn_sizes_are_the_images_own(model, tmp_path):
    """They follow from the image's key alone, and reach both branches of the guidance."""
    from comfyui_pcpo.trainers.config.train_config import validate
    from comfyui_pcpo.trainers.run.iteration import requests_of
    from comfyui_pcpo.trainers.run.setup import prepare

    def prepared(sizes):
        prompts = tmp_path / "p.txt"
        prompts.write_text("a cat\na dog\n", encoding="utf-8")
        config = validate(
            {
                "model": {"source": str(model), "size_condition": sizes},
                "sampler": {"steps": 2, "guidance_scale": 3.0},
                "prompts": {"source": str(prompts), "per_iteration": 2, "images_per_prompt": 8},
                "rewards": {"jpeg_incompressibility": 1.0},
                "run": {"eval_prompts": 0},
            },
            "test",
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        return prepare(config)

    three = prepared([CHOICES[:6], CHOICES[6:12], CHOICES[12:]])
    assert three.config.model.size_condition == CHOICES
    requests = requests_of(three.config, 2, 0)
    told = three.sampler.sizes(requests)
    assert told is not None
    assert {*map(tuple, told.int().tolist())} == {CHOICES[:6], CHOICES[6:12], CHOICES[12:]}
    assert told[5:6].equal(three.sampler.sizes(requests[5:6]))
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor(501)
    embeds = three.sampler.conditions(requests[:3])
    with torch.no_grad():
        drawn = three.sampler.policy(x, timestep, embeds)
        for i, sizes in enumerate(told[:3].int().tolist()):
            one = prepared(sizes)
            alone = one.sampler.policy(
                x[i : i + 1], timestep, one.sampler.conditions(requests[i : i + 1])
            )
            # one by one rounds otherwise, and guidance triples that
            assert (alone - drawn[i : i + 1]).abs().max() < 5e-5
            other = three.sampler.conditions(requests[:3][i : i + 1])
            other = replace(other, sizes=told[:3].roll(1, 0)[i : i + 1])
            if not other.sizes.equal(told[i : i + 1]):
                changed = one.sampler.policy(x[i : i + 1], timestep, other)
                assert (changed - alone).abs().max() > 1e-3


def test_two_processes_train_what_one_does(model, tmp_path):
    """Sums of gradients are rounded in another order; eps 1 keeps Adam from amplifying that."""
    plain = "--optimizer.eps 1 --optimizer.lr 1 --optimizer.weight-decay 0 --run.iterations 1"
    plain += f" {KINDS['drawn-sizes']}"
    alone = load_file(train(model, tmp_path / "alone", plain).last_export())
    words = ["train", str(tmp_path / "alone.toml"), "--model.source", str(model)]
    words += ["--prompts.source", str(tmp_path / "alone.txt"), "--out", str(tmp_path / "two")]
    process = pcpo(*words, *plain.split(), "--num-processes", "2", "--run.device", "cpu")
    said, erred = process.communicate(timeout=300)
    assert process.returncode == 0, (said, erred)
    both = load_file(JobFolder(tmp_path / "two").last_export())
    assert both.keys() == alone.keys()
    for key, tensor in alone.items():
        assert (tensor - both[key]).abs().max() < 1e-6, key
    assert max(t.abs().max() for key, t in alone.items() if "lora_up" in key) > 1e-4


@pytest.mark.parametrize("kind", ["plain", "drawn-sizes"])
def test_a_run_is_resumed_to_the_same_bytes(model, tmp_path, kind):
    whole = train(model, tmp_path / "whole", f"--run.iterations 2 {KINDS[kind]}").last_export()
    short = train(model, tmp_path / "short", f"--run.iterations 1 {KINDS[kind]}")
    assert main(["resume", str(short.root), "--iterations", "2"]) == 0
    found, expected = load_file(short.last_export()), load_file(whole)
    assert found.keys() == expected.keys()
    assert all(found[key].equal(tensor) for key, tensor in expected.items())


def test_a_zero_snr_model_is_spaced_so_that_it_begins_in_pure_noise(model, tmp_path):
    from comfyui_pcpo.trainers.families.scheduler import ZERO_SNR, SchedulerConfig
    from comfyui_pcpo.trainers.run.plans import diffusion_grid

    usual = SchedulerConfig(beta_schedule="scaled_linear", prediction_type="v_prediction")
    ends = SchedulerConfig.from_dict(
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"} | ZERO_SNR
    )
    assert diffusion_grid(usual, 4, "leading").timesteps[0] == 750
    for spacing in ("leading", "trailing", "model"):
        grid = diffusion_grid(ends, 4, spacing)
        assert grid.timesteps[0] == 999 and grid.levels[0][0] == 0


def test_images_are_guided_by_loras_in_the_command_line(model, tmp_path):
    """gamma 0 is the base, 1 the LoRA; 2 extrapolates; with guidance and sizes that images draw."""
    export = train(model, tmp_path / "run", "--run.iterations 1 --optimizer.lr 0.01").last_export()

    def sampled(*words: str) -> torch.Tensor:
        latents = tmp_path / "latents.safetensors"
        options = ["--model", str(model), "--prompts", "a cat", "--count", "2", "--steps", "2"]
        options += ["--width", "64", "--height", "64", "--guidance-scale", "3", "--device", "cpu"]
        options += ["--size-condition", *map(str, CHOICES), "--out", str(tmp_path / "out")]
        assert main(["sample", *options, "--latents", str(latents), *words]) == 0
        return load_file(latents)["latents"]

    base, tuned = sampled(), sampled("--lora", str(export))
    assert (tuned - base).abs().max() > 1e-3
    assert (sampled("--irg", f"{export}:0") - base).abs().max() < 1e-4
    assert (sampled("--irg", f"{export}:1") - tuned).abs().max() < 1e-4
    assert (sampled("--irg", f"{export}:2") - tuned).abs().max() > 1e-3
