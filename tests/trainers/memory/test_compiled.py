"""`model.compile`: which blocks, what is refused, and that training stays exact on policy."""

from __future__ import annotations

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import (
    DEMO_FLOW_FOLDER,
    DEMO_FOLDER,
    ConfigError,
    TrainConfig,
    validate,
)
from comfyui_pcpo.trainers.families import load_family
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.memory.compile import check_compiler, compile_blocks
from comfyui_pcpo.trainers.run import setup
from comfyui_pcpo.trainers.run.setup import check_split
from flux_fixture import tiny_transformer
from safetensors.torch import load_file

WANTED = {"BasicTransformerBlock", "JointTransformerBlock"}
WANTED |= {"FluxTransformerBlock", "FluxSingleTransformerBlock"}


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("model", ["sd", "flow", "flux"])
def test_the_repeated_blocks_alone_are_compiled(model):
    folder = {"sd": DEMO_FOLDER, "flow": DEMO_FLOW_FOLDER}
    network = load_family(folder[model]).network if model in folder else tiny_transformer()
    names = list(network.state_dict())
    count = compile_blocks(network)
    compiled = [m for m in network.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == count > 0
    assert {type(module).__name__ for module in compiled} <= WANTED
    assert sum(type(module).__name__ in WANTED for module in network.modules()) == count
    assert list(network.state_dict()) == names


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="cannot be compiled; set model"):
        validate({"model": {"compile": True, "base": "int8"}}, "here")
    with pytest.raises(ConfigError, match="keeps the images' gradients apart inside"):
        validate({"model": {"compile": True}, "method": {"update": "one_pass"}}, "here")
    split = {"model": {"compile": True}, "trainable": {"kind": "full"}}
    with pytest.raises(ConfigError, match="weights that are split over processes"):
        check_split(TrainConfig.model_validate(split))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton is missing"):
        check_compiler(torch.device("cuda"))


def test_without_a_compiler_nothing_is_begun(monkeypatch, tmp_path, capsys):
    def missing():
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    asked = ["demo", "--model", "tiny-sd", "--model.compile", "--run.device", "cpu"]
    assert main([*asked, "--out", str(tmp_path / "run")]) == 2
    assert "there is no C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-sd", "tiny-flow"])
def test_a_compiled_run_is_exact_on_policy_and_near_the_other(tmp_path, model):
    small = [
        *("--run.iterations", "1", "--run.eval-prompts", "2", "--run.eval-steps", "2"),
        *("--sampler.steps", "3", "--prompts.per-iteration", "2", "--run.micro-batch", "8"),
        *("--prompts.images-per-prompt", "4", "--sampler.guidance-scale", "2"),
        *("--method.update", "two_pass"),
    ]
    found = []
    for extra in ([], ["--model.compile"]):
        AcceleratorState._reset_state(reset_partial_state=True)
        root = tmp_path / f"run{len(found)}"
        assert main(["demo", "--model", model, "--out", str(root), *small, *extra]) == 0
        assert JobFolder(root).metrics()[0]["log_ratio_max_on_policy"] < 1e-6
        found.append(load_file(JobFolder(root).last_export()))
    plain, compiled = found
    assert plain.keys() == compiled.keys()
    moved = torch.cat([tensor.float().flatten() for tensor in plain.values()])
    other = torch.cat([tensor.float().flatten() for tensor in compiled.values()])
    assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 0.999


@pytest.mark.parametrize("is_compiled", [False, True])
def test_branches_that_are_compiled_apart_stay_apart(is_compiled, monkeypatch):
    monkeypatch.setattr(setup, "check_compiler", lambda device: None)
    monkeypatch.setattr(setup, "compile_blocks", lambda network: 0)
    sampler = {"guidance_scale": 3.0, "guidance_gradient": "conditional"}
    model = {"compile": is_compiled}
    built = setup.prepare(validate({"model": model, "sampler": sampler}, "here"))
    assert built.sampler.untrained.gradient == ("conditional" if is_compiled else "both")
