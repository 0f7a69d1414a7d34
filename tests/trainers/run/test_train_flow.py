"""Training of flow models, on tiny random SD3 and FLUX models: every sampler and its exports."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.tests.fixtures import flux_fixture, sd3_fixture
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.lora import adapters
from safetensors.torch import load_file

SMALL = """
rewards = { jpeg_incompressibility = 1.0 }
model = { width = 64, height = 64, t5_length = 16 }
sampler = { steps = 4, drop_last = 1 }
advantage = { kind = "group" }
prompts = { per_iteration = 2, images_per_prompt = 2 }
run = { iterations = 2, micro_batch = 4, save_every = 1, eval_prompts = 2, eval_steps = 2 }
"""
SAMPLERS = {
    "dance": "--sampler.transition dance_sde --sampler.noise-level 0.3 --sampler.decode clean "
    "--sampler.grid uniform --sampler.shift 3",
    "flow-grpo": "--sampler.transition flow_sde --sampler.noise-level 0.7 "
    "--sampler.guidance-scale 4.5 --sampler.guidance-gradient conditional "
    "--method.kl without_interval --method.kl-weight 0.01",
    "cps": "--sampler.transition cps --sampler.noise-level 0.8 --method.credit native "
    "--method.ratio squared_error --method.selection sliding_window --method.window 2",
}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("models")
    return {
        "sd3": sd3_fixture.write_folder(made / "sd3"),
        "flux": flux_fixture.write_folder(made / "flux"),
    }


def train(model, root, options: str) -> int:
    prompts, config = root.with_suffix(".txt"), root.with_suffix(".toml")
    prompts.write_text("a cat\na dog\n", encoding="utf-8")
    config.write_text(SMALL, encoding="utf-8")
    files = ["--model.source", str(model), "--prompts.source", str(prompts), "--out", str(root)]
    return main(["train", str(config), *files, *options.split()])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_every_sampler_trains(folders, tmp_path, family, sampler):
    assert train(folders[family], tmp_path / "run", SAMPLERS[sampler]) == 0
    run = JobFolder(tmp_path / "run")
    lines = run.metrics()
    assert [line["iteration"] for line in lines] == [1, 2]
    for line in lines:
        assert line["log_ratio_max_on_policy"] == 0 and line["grad_norm"] > 0
    tensors = load_file(run.last_export())
    assert all(key.startswith("transformer.") for key in tensors)
    assert any(t.abs().max() > 0 for key, t in tensors.items() if "lora_B" in key)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_an_export_is_the_trained_network(folders, tmp_path, family):
    assert train(folders[family], tmp_path / "run", SAMPLERS["dance"]) == 0
    run = JobFolder(tmp_path / "run")
    model = load_family(folders[family])
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    embeds, sigma = model.encode(["a cat", "a dog"]), torch.tensor(0.7)
    with torch.no_grad():
        base = model.predict(latents, sigma, embeds)
        loaded = adapters.load_lora(model.network, run.last_export())
        tuned = model.predict(latents, sigma, embeds)
    assert (tuned - base).abs().max() > 1e-6
    assert {name.rpartition(".")[2] for name in loaded.targets} >= {"to_q"}
    again = adapters.export_lora(model.network, tmp_path / "again.safetensors")
    first, second = load_file(run.last_export()), load_file(again)
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def test_a_sampler_of_the_other_kind_is_refused(folders, tmp_path, capsys):
    assert train(folders["sd3"], tmp_path / "run", "--sampler.transition ddim") == 2
    said = capsys.readouterr().err
    assert "sd3 is a flow model" in said and "flow_sde" in said
