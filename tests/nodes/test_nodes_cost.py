"""What a training costs, whether it is there already, and what of a graph it depends on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import comfy_api_fixture
import pytest
from comfyui_pcpo.nodes import graph
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.nodes.rewards import nodes as rewards
from comfyui_pcpo.nodes.training import cost as training_cost
from comfyui_pcpo.nodes.training import easy
from comfyui_pcpo.nodes.training import nodes as training
from comfyui_pcpo.nodes.training import run as training_run
from comfyui_pcpo.nodes.training import settings as training_settings
from comfyui_pcpo.trainers.config.train_config import TrainConfig, read_preset, validate
from comfyui_pcpo.trainers.estimate.disk import disk_bytes
from comfyui_pcpo.trainers.estimate.fit import CARDS, CPU, GIB
from comfyui_pcpo.trainers.estimate.network_costs import network_for
from comfyui_pcpo.trainers.families.registry import families_of_lora
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.run import start

CARD = training_cost.Place("cuda:0", "NVIDIA GeForce RTX 4060", 8 * GIB, ())
HERE = training_cost.Place("cpu", "", 16 * GIB, ())


@pytest.fixture
def jobs(tmp_path):
    found = JobRegistry(tmp_path / "jobs")
    yield found
    found.close()


def values_of(preset: str, **changes: Any) -> dict[str, Any]:
    return training_settings.values_of({"preset": preset, **changes})


def cost(jobs: JobRegistry, preset: str, base: str, place=CARD, **changes: Any):
    return training_cost.cost_of(values_of(preset, **changes), base, place, jobs)


# --- the cost ------------------------------------------------------------------------------------


def test_a_preset_for_8_gb_fits_and_says_so(jobs):
    found = cost(jobs, "sd15-8gb", "sd1")
    assert found.memory < 8 * GIB and not found.changes
    said = training_cost.in_words(found)
    assert said.startswith("about ") and " of 8 GB of memory, " in said and "fit" not in said


def test_what_does_not_fit_says_what_would(jobs):
    found = cost(jobs, "sd15-8gb", "sd1", run_micro_batch=32)
    assert found.memory > 8 * GIB
    said = training_cost.in_words(found)
    assert said.endswith("that does not fit: set run_micro_batch 1 in PCPO Training Settings")
    assert "set model_offload blocks" in training_cost.in_words(cost(jobs, "flux-24gb", "flux"))
    small = replace(CARD, memory=2 * GIB)
    assert "whatever the settings" in training_cost.in_words(cost(jobs, "flux-24gb", "flux", small))


def test_the_network_is_the_model_s_and_not_the_preset_s(jobs):
    source = values_of("sd15-8gb")["model"]["source"]
    assert training_cost.network_of("demo", source) == network_for("demo")
    assert training_cost.network_of("sd1", source) == network_for(source)
    assert training_cost.network_of("sd1", "demo") == network_for("sd15")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", CARDS[2]),
        ("NVIDIA A100-SXM4-40GB", CARDS[2]),
        ("NVIDIA GeForce RTX 4090", CARDS[1]),
        ("NVIDIA GeForce RTX 3060", CARDS[0]),
    ],
)
def test_a_card_is_known_by_its_name(name, kind):
    place = training_cost.Place("cuda:0", name, GIB, ())
    assert training_cost.computer_of(place) == kind
    assert training_cost.computer_of(HERE) == CPU


def test_the_time_is_measured_where_there_is_an_earlier_job(jobs):
    guessed = cost(jobs, "demo", "demo", HERE).seconds
    folder = JobFolder(jobs.root / ("a" * 16))
    folder.root.mkdir(parents=True)
    job = {"config": values_of("demo"), "inputs": {"base": "demo"}, "device": "cpu"}
    folder.start(job | {"name": "x", "created": 1.0})
    folder.status("done", iteration=3, of=3)
    for i, seconds in enumerate((90.0, 2.0, 2.0), 1):  # the first one loads
        folder.add_metrics({"iteration": i, "seconds": seconds})
    measured = cost(jobs, "demo", "demo", HERE).seconds
    assert measured == pytest.approx(18 * 2.0) != guessed
    twice = cost(jobs, "demo", "demo", HERE, run_iterations=36).seconds
    assert twice == pytest.approx(2 * measured)
    large = cost(jobs, "demo", "demo", HERE, prompts_per_iteration=160).seconds
    assert large != pytest.approx(10 * measured)  # a small job does not tell of a large one
    assert cost(jobs, "demo", "demo", CARD).seconds != measured  # on another device
    assert cost(jobs, "sd15-8gb", "sd1", HERE).seconds > 1e3 * measured  # another network


def test_disk_is_counted_as_a_run_writes_it(tmp_path):
    values = read_preset("demo").model_dump(mode="json")
    values["run"] |= {"iterations": 2, "save_every": 1, "eval_prompts": 4, "eval_steps": 2}
    values["prompts"] |= {"per_iteration": 2, "images_per_prompt": 2}
    values["sampler"]["steps"] = 2
    values["trainable"] |= {"targets": TrainConfig().trainable.targets, "rank": 256}
    start.train(validate(values, "a test"), tmp_path / "run")
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    written = sum(file.stat().st_size for file in files)
    assert disk_bytes(values, network_for("demo")) == pytest.approx(written, rel=0.3)


def test_a_full_disk_is_refused_before_anything_is_written(jobs, tmp_path, monkeypatch):
    found = cost(jobs, "sd15-8gb", "sd1")
    training_cost.check_disk(found.disk, (tmp_path / "not" / "there",))
    free = SimpleNamespace(free=30e6)
    monkeypatch.setattr(training_cost.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(NodeError, match="has 30 MB free and this training writes about"):
        training_cost.check_disk(found.disk, (tmp_path / "loras",))


# --- the same training ---------------------------------------------------------------------------


def add(jobs: JobRegistry, digit: str, state: str, sign: str | None, created: float) -> str:
    folder = JobFolder(jobs.root / (digit * 16))
    folder.root.mkdir(parents=True)
    about = {"name": digit, "created": created, "device": "cpu", "inputs": {"asked": sign}}
    folder.start({"config": values_of("demo"), **about})
    folder.status(state, iteration=2, of=3)
    return folder.root.name


def test_the_newest_job_with_the_same_inputs_is_found(jobs):
    add(jobs, "a", "done", "x", 1.0)
    newer = add(jobs, "b", "done", "x", 2.0)
    add(jobs, "c", "done", None, 3.0)
    assert training_run.earlier(jobs, "x") == newer
    assert training_run.earlier(jobs, "y") is None
    assert training_run.earlier(jobs, None) is None  # not: those whose inputs nobody knows


@pytest.mark.parametrize(
    ("state", "after", "said"),
    [
        ("done", "done", "it is there already (done): its inputs are unchanged"),
        ("stopped", "queued", "it was stopped and goes on"),
        ("failed", "queued", "it was failed and goes on"),
    ],
)
def test_a_job_that_ended_early_goes_on(jobs, monkeypatch, state, after, said):
    monkeypatch.setattr(jobs, "wake", lambda: None)
    id = add(jobs, "a", state, "x", 1.0)
    text = training_run.go_on(jobs, id)
    assert text.startswith(said) and text.endswith(f"\njob {id}: {after}")
    assert jobs.summary(id)["state"] == after


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_what_a_node_depends_on_is_the_same_whatever_the_ids():
    names = ("model", "clip")
    one = {
        "1": node("Load", file="a"),
        "2": node("Lora", model=["1", 0], clip=["1", 1], strength=0.5),
        "3": node("Train", model=["2", 0], clip=["2", 1], name="x"),
    }
    text = {"1": "9", "2": "sub:4", "3": "7"}
    other = {
        text[id]: node(
            each["class_type"],
            **{k: [text[v[0]], v[1]] if graph.is_link(v) else v for k, v in each["inputs"].items()},
        )
        for id, each in reversed(one.items())
    }
    found = graph.upstream(one, "3", names)
    assert found == graph.upstream(other, "7", names) != graph.upstream(one, "2", names)
    other["9"]["inputs"]["file"] = "b"
    assert graph.upstream(other, "7", names) != found
    assert graph.upstream(one, "4", names) is None
    del one["1"]
    assert graph.upstream(one, "3", names) is None


# --- before anything runs ------------------------------------------------------------------------


def sent(monkeypatch, nodes: dict[str, Any], messages: list[Any]) -> None:
    """A graph that is being validated for a page."""
    host = SimpleNamespace(send_sync=lambda *said: messages.append(said))
    monkeypatch.setattr(graph, "server", lambda: host)
    graph.remember({"prompt": nodes, "client_id": "page"})


def validated(cls: Any, id: str, *given: Any) -> bool | str:
    return type(cls.__name__, (cls,), {"hidden": SimpleNamespace(unique_id=id)}).validate_inputs(
        *given
    )


def test_the_page_hears_what_is_refused(monkeypatch):
    messages: list[Any] = []
    text = {"source": "text", "source.text": " "}
    sent(monkeypatch, {"1": node("PCPOPrompts", **text), "2": node("PCPOPrompts")}, messages)
    said = validated(training.PCPOPrompts, "1", {})
    assert said == "the text holds no prompt; write one prompt per line"
    assert messages == [("pcpo.refused", {"node_type": "PCPOPrompts", "text": said}, "page")]
    assert validated(training.PCPOPrompts, "3", {}) is True  # not in the graph


def test_what_is_connected_is_not_guessed(monkeypatch):
    nodes = {
        "1": node("PCPOPrompts", source="text", **{"source.text": ["9", 0]}),
        "2": node("PCPOTrainingSettings", preset="demo", **{"preset.run_iterations": ["9", 0]}),
        "3": node("PCPOReward", reward=["9", 0], weights="automatic", options=""),
        "4": node("PCPOTrainInBackground", name=["9", 0], settings=["2", 0], model=["9", 0]),
    }
    sent(monkeypatch, nodes, [])
    assert validated(training.PCPOPrompts, "1", {}) is True
    assert validated(training.PCPOTrainingSettings, "2", {}) is True
    assert validated(rewards.PCPOReward, "3", None) is True
    nodes["5"] = node("PCPOTrainingSettings", preset="demo", **{"preset.sampler_noise_level": 0})
    assert "noise_level is 0" in str(validated(training.PCPOTrainingSettings, "5", {}))


@pytest.mark.parametrize(
    ("names", "families"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.alpha"], ("sd1",)),
        (["lora_unet_mid_block_attentions_0_transformer_blocks_1_ff.alpha"], ("sdxl",)),
        (["unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.lora_A.weight"], ("sd1", "sdxl")),
        (["lora_unet_joint_blocks_3_x_block_attn_qkv.alpha"], ("sd3",)),
        (["transformer.single_transformer_blocks.3.proj_mlp.lora_A.weight"], ("klein", "flux")),
        (["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"], ("sd3", "klein", "flux")),
        (["diffusion_model.layers.3.attention.to_q.lora_A.weight"], ("zimage",)),
        (["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"], ()),
        (["something.lora_A.weight"], ()),
    ],
)
def test_a_lora_s_families_by_its_names(names, families):
    assert families_of_lora(names) == families


# --- the easy node -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "preset"),
    [
        *(("demo", "demo"), ("demo-flow", "demo-flow"), ("sd1", "sd15-8gb")),
        *(("sdxl", "sdxl-12gb"), ("sd3", "sd35-16gb"), ("flux", "flux-24gb")),
    ],
)
def test_the_easy_node_takes_the_preset_that_suits_the_model(base, preset):
    assert easy.preset_for(base) == preset
    assert easy.settings_for(base, "usual") == values_of(preset)
    usual = values_of(preset)["run"]["iterations"]
    assert easy.settings_for(base, "long")["run"]["iterations"] == 3 * usual
    assert easy.settings_for(base, "short")["run"]["iterations"] == round(usual / 3)


@pytest.mark.parametrize(
    ("base", "preset"),
    [("demo-flow", "demo-flow-fast"), ("sd3", "sd35-16gb-fast"), ("klein", "klein-16gb-fast")],
)
def test_the_easy_node_can_be_fast_on_flow_models(base, preset):
    assert easy.settings_for(base, "usual", "fast") == values_of(preset)
    for other in ("demo", "sd1", "sdxl"):
        with pytest.raises(NodeError, match="speed is 'fast', which was tried on flow models"):
            easy.settings_for(other, "usual", "fast")


def test_the_easy_node_has_prompts_of_its_own():
    assert easy.prompts_for("demo", " \n").built_in == "scenes"
    assert easy.prompts_for("sd1", "").built_in == "varied"
    assert easy.prompts_for("sd1", "a cat\na dog").texts == ("a cat", "a dog")


def test_the_easy_node_s_defaults_are_the_full_one_s():
    full, small = (
        {given.id: given.default for given in comfy_api_fixture.schema_of(cls).inputs[-4:]}
        for cls in (training.PCPOTrainInBackground, easy.PCPOTrainEasy)
    )
    assert {name: full[name] for name in easy.BEHAVIOUR} == easy.BEHAVIOUR
    assert small.keys() & full.keys() == {"train_again", "dry_run"}
