"""`pcpo bench --suite` on a CPU, with small networks of each family."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from comfyui_pcpo.trainers.bench import case as of_case
from comfyui_pcpo.trainers.bench import suite
from comfyui_pcpo.trainers.bench.case import Case, config_of, measure_case
from comfyui_pcpo.trainers.bench.model import random_model
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.config.train_config import ConfigError, read_preset
from comfyui_pcpo.trainers.families.registry import FAMILIES, spec_of_source

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(autouse=True)
def a_fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def measured(case, device):
    return {"seconds_per_image": dict.fromkeys(("rollout", "update", "iteration"), 1.0)} | {
        "memory_gib": 2.0,
        "estimated_gib": 2.5,
        "tflops": 50.0,
        "log_ratio_max_on_policy": 0.0,
    }


def run(file=None, minutes=12, measure=measured):
    suite.run_suite("cpu", minutes, file and str(file), is_tiny=True, measure=measure)


@pytest.mark.parametrize(("preset", "side"), suite.SIZES)
def test_every_family_trains_in_one_pass_and_is_on_policy(preset, side):
    found = measure_case(Case(preset, side, is_tiny=True), "cpu")
    assert "error" not in found, found["error"]
    assert found["log_ratio_max_on_policy"] == 0
    assert 0 < found["seconds_per_image"]["rollout"] < found["seconds_per_image"]["iteration"]


@pytest.mark.parametrize(
    "changes", [{"update": "two_pass"}, {"base": "fp8"}, {"base": "nf4"}], ids=str
)
def test_passes_and_bases_are_measured(changes):
    found = measure_case(replace(Case("zimage-16gb", 512, is_tiny=True), **changes), "cpu")
    assert "error" not in found, found["error"]
    assert found["log_ratio_max_on_policy"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_random_weights_are_of_the_published_shapes_and_keep_activations_finite(name):
    spec = FAMILIES[name]
    tiny = random_model(spec, torch.float32, CPU, is_tiny=True, waits=False)
    family = tiny.family
    assert type(family.network).__name__ == spec.class_name
    latents = torch.randn(2, *family.latent_shape(64, 64))
    out = family.predict(latents, torch.tensor(0.5), tiny.conditioning.embeds[[0, 0]])
    assert out.shape == latents.shape and out.isfinite().all() and out.std() > 1e-3
    assert family.decode(latents).shape == (2, 3, 64, 64)


def test_the_suite_has_every_family_and_what_must_be_compared():
    cases = suite.cases()
    assert len({case.name for case in cases}) == len(cases)
    sources = {read_preset(case.preset).model.source for case in cases}
    assert {spec_of_source(source).name for source in sources} == FAMILIES.keys()
    assert {case.base for case in cases} == {"same", "fp8", "nf4"}
    assert all(case.update == "two_pass" for case in cases if case.compile)
    assert {c.side for c in cases if c.preset == "flux-24gb"} == {512, 720}


def test_settings_save_memory_only_where_the_card_is_small():
    case = Case("flux-24gb", 512)
    large, small = (config_of(case, CPU, card * GIB) for card in (140, 24))
    assert not large.model.gradient_checkpointing and large.run.micro_batch == 4
    assert small.model.gradient_checkpointing and small.run.micro_batch == 1


def test_rows_are_kept_as_they_come_and_a_file_is_continued(tmp_path, capsys):
    file, seen = tmp_path / "suite.json", []

    def stops(case, device):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(case.name)
        return measured(case, device)

    with pytest.raises(KeyboardInterrupt):
        run(file, measure=stops)
    assert len(json.loads(file.read_text())["cases"]) == 3

    def continues(case, device):
        assert case.name not in seen[:3]
        return measured(case, device)

    capsys.readouterr()
    run(file, measure=continues)
    names = [row["name"] for row in json.loads(file.read_text())["cases"]]
    assert names == [case.name for case in suite.cases()]
    out = capsys.readouterr().out
    assert "sd15-8gb, 512 px, two pass" in out and "2.00" in out and "2.50" in out


def test_what_is_not_reached_in_time_or_fails_has_a_row(tmp_path, capsys, monkeypatch):
    run(minutes=1e-9)
    assert "not reached in 1e-09 minutes" in capsys.readouterr().out

    def none_left(*given, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has")

    monkeypatch.setattr(of_case, "prepare", none_left)
    found = measure_case(Case("sd15-8gb", 512, is_tiny=True), "cpu")
    assert found["error"] == "does not fit: CUDA out of memory"
    assert "does not fit" in suite.line_of({"name": "a case", **found}, 1.0)


def die(case, device):
    os._exit(9)


def count(case, device):
    return {"side": case.side + 1}


def test_a_process_that_dies_takes_no_other_case_with_it(monkeypatch):
    worker = suite.Worker()
    monkeypatch.setattr(
        suite, "get_context", lambda kind: __import__("multiprocessing").get_context("fork")
    )
    monkeypatch.setattr(suite, "measure_case", die)
    assert "the process died" in worker(Case("sd15-8gb", 512), "cpu")["error"]
    monkeypatch.setattr(suite, "measure_case", count)
    assert worker(Case("sd15-8gb", 512), "cpu") == {"side": 513}
    worker.close()


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"device": "another"}'])
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, content):
    file = tmp_path / "suite.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="no report of this device"):
        run(file)
    assert file.read_text() == content


def test_the_command_line_refuses_what_makes_no_sense(capsys):
    assert main(["bench", "--suite", "--device", "cpu"]) == 2
    assert "--size tiny" in capsys.readouterr().err
    assert main(["bench", "--json", "a.json"]) == 2
    assert "--suite" in capsys.readouterr().err
