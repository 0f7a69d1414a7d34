"""Training from the graph in real ComfyUI: queued, followed, used, and refused.

What it needs is in comfyui_fixture.py. Stock checkpoints are the tiny ones.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_fixture import HOST, MODELS, needs_host, needs_models, write_lora
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_server_fixture import Server
from safetensors import safe_open
from safetensors.torch import load_file

pytestmark = needs_host

Graph = dict[str, dict[str, Any]]
SMALL = {
    "run_iterations": 4,
    "run_save_every": 2,
    "run_micro_batch": 16,
    "run_eval_prompts": 4,
    "run_eval_steps": 3,
    "prompts_per_iteration": 4,
    "prompts_images_per_prompt": 4,
    "sampler_steps": 4,
}


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def parts(checkpoint: str | None = None, lora: str | None = None) -> Graph:
    """MODEL, CLIP and VAE: the demo's, or a checkpoint's, at nodes "model" to "vae"."""
    if checkpoint is None:
        return {"load": node("PCPODemoModel", demo="tiny-sd")}
    graph = {"load": node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    if lora is not None:
        graph["plain"] = graph.pop("load")
        graph["load"] = node(
            "LoraLoader",
            model=["plain", 0],
            clip=["plain", 1],
            lora_name=lora,
            strength_model=0.7,
            strength_clip=0.4,
        )
    return graph


def training(
    name: str,
    graph: Graph | None = None,
    text: str = "",
    preset: str = "demo",
    **settings: Any,
) -> Graph:
    """A small training of the MODEL, CLIP and VAE of node "load" and others; settings by name."""
    graph = parts() if graph is None else graph
    vae = ["plain", 2] if "plain" in graph else ["load", 2]
    chosen = {f"preset.{key}": value for key, value in (SMALL | settings).items()}
    source = {"source": "text", "source.text": text} if text else {"source": "scenes"}
    return graph | {
        "reward": node(
            "PCPOReward", reward="jpeg_incompressibility", weights="automatic", options=""
        ),
        "prompts": node("PCPOPrompts", **source),
        "settings": node("PCPOTrainingSettings", preset=preset, **chosen),
        "train": node(
            "PCPOTrainInBackground",
            model=["load", 0],
            clip=["load", 1],
            vae=vae,
            reward=["reward", 0],
            prompts=["prompts", 0],
            settings=["settings", 0],
            name=name,
            continue_from="none",
            on_server_exit="save_and_stop",
            pause_while_busy=False,
        ),
    }


def images(model: list[Any]) -> Graph:
    """Two pictures of a MODEL, at node "decode"."""
    return {
        "text": node("CLIPTextEncode", text="a red circle", clip=["load", 1]),
        "guider": node("BasicGuider", model=model, conditioning=["text", 0]),
        "sigmas": node("PCPOScheduler", model=["load", 0], steps=4, grid="auto", denoise=1.0),
        "noise": node("PCPONoise", seed=3),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        "sample": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="seen"),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    for kind in ("checkpoints", "loras"):
        (folder / "models" / kind).mkdir(parents=True)
    for file in (MODELS / "checkpoints").glob("*"):
        (folder / "models" / "checkpoints" / file.name).symlink_to(file)
    with Server(HOST, folder) as started:
        yield started
    for job in map(JobFolder, jobs_of(started).glob("*")):
        if job.is_held():
            os.kill(job.read("status.json")["pid"], signal.SIGKILL)


def jobs_of(server: Server) -> Path:
    return server.folder / "user" / "__pcpo" / "jobs"


def newest(server: Server) -> dict[str, Any]:
    return server.get("/pcpo/jobs")["jobs"][0]


def wait(server: Server, id: str, *states: str) -> dict[str, Any]:
    """The job, once it is in one of the states."""
    end = time.monotonic() + 300
    while (job := server.get(f"/pcpo/jobs/{id}"))["state"] not in states:
        assert time.monotonic() < end and job["state"] not in ("failed", "lost"), job
        time.sleep(0.2)
    return job


def started(server: Server, graph: Graph) -> str:
    """The id of the job that a graph starts."""
    said = server.run(graph)["train"]["text"][0]
    id = newest(server)["id"]
    assert id in said
    return id


def error_of(server: Server, graph: Graph) -> str:
    """What the user is told of a graph that fails; it must not have started a job."""
    before = sorted(jobs_of(server).glob("*/"))  # without locks, which come and go
    answer = server.post("/prompt", {"prompt": graph, "client_id": "tests"})
    if faults := answer["node_errors"]:  # said before anything runs
        (fault,) = (fault for found in faults.values() for fault in found["errors"])
        return fault["details"].partition(" - ")[2]
    status = server.ended(answer["prompt_id"])["status"]
    assert status["status_str"] == "error"
    told = [data for kind, data in status["messages"] if kind == "execution_error"]
    assert sorted(jobs_of(server).glob("*/")) == before
    text = told[0]["exception_message"].strip()
    assert "\n" not in text, text
    return text


# --- the whole way -------------------------------------------------------------------------------


def test_from_the_graph_to_a_lora_in_the_graph(server):
    graph = training("first", run_iterations=6)
    server.run({key: graph[key] for key in ("load",)} | images(["load", 0]))  # all is loaded
    begin = time.monotonic()
    id = started(server, graph)
    print(f"the graph returned in {time.monotonic() - begin:.2f} s")
    begin = time.monotonic()
    server.run(parts() | images(["load", 0]) | {"noise": node("PCPONoise", seed=4)})
    print(f"two pictures meanwhile in {time.monotonic() - begin:.2f} s")
    assert server.get(f"/pcpo/jobs/{id}")["state"] in ("preparing", "running")
    followed = graph | {"wait": node("PCPOWaitForJob", job=["train", 0])}
    followed["train"] = node("PCPOJob", job="newest job")
    followed["show"] = node("PCPOJob", job="newest job", from_job=["wait", 0])
    followed["curves"] = node("SaveImage", images=["show", 3], filename_prefix="curves")
    followed["samples"] = node("SaveImage", images=["show", 4], filename_prefix="samples")
    outputs = server.run(followed)
    assert "first: done, 6 of 6 iterations" in outputs["show"]["text"][0]
    assert outputs["curves"]["images"] and len(outputs["samples"]["images"]) == 4
    written = server.folder / "models" / "loras" / "first.safetensors"
    export = JobFolder(jobs_of(server) / id).last_export()
    assert written.read_bytes() == export.read_bytes()

    logged = len(server.log())
    stock = node(
        "LoraLoaderModelOnly", model=["load", 0], lora_name=written.name, strength_model=1.0
    )
    ours = node(
        "PCPOLoadJobLora", model=["load", 0], job="first", which="latest", iteration=1, strength=1.0
    )
    pictures = {}
    for name, loader in {"stock": stock, "ours": ours, "base": node("PCPODemoModel")}.items():
        loader["inputs"].setdefault("demo", "tiny-sd") if name == "base" else None
        found = server.run(parts() | {"tuned": loader} | images(["tuned", 0]))
        pictures[name] = [
            (server.folder / "output" / image["filename"]).read_bytes()
            for image in found["save"]["images"]
        ]
    assert "not loaded" not in server.log()[logged:]
    pixels = {name: [strip(png) for png in pngs] for name, pngs in pictures.items()}
    assert pixels["stock"] == pixels["ours"] != pixels["base"]


def strip(png: bytes) -> bytes:
    """The image data of a PNG, without the graph that ComfyUI writes beside it."""
    return png[png.index(b"IDAT") :]


def test_comfyui_s_own_training_nodes_work_on_a_job(server):
    if not server.get("/pcpo/jobs")["jobs"]:
        started(server, training("first"))
    wait(server, newest(server)["id"], "done")
    graph = parts() | {
        "job": node("PCPOJob", job="newest job"),
        "lora": node("LoraModelLoader", model=["load", 0], lora=["job", 5], strength_model=1.0),
        "stored": node("SaveLoRA", lora=["job", 5], prefix="loras/kept"),
        "plot": node("LossGraphNode", loss=["job", 6], filename_prefix="loss"),
    }
    graph["lora"]["inputs"]["bypass"] = False
    server.run(graph | images(["lora", 0]))
    stored = next((server.folder / "output" / "loras").glob("kept*.safetensors"))
    written = load_file(JobFolder(jobs_of(server) / newest(server)["id"]).last_export())
    assert load_file(stored).keys() == written.keys()


def test_a_lora_is_exported_and_no_file_is_replaced(server):
    if not server.get("/pcpo/jobs")["jobs"]:
        started(server, training("first"))
    job = wait(server, newest(server)["id"], "done")
    chosen = {"job": job["name"], "which": "iteration", "iteration": 2, "name": "mine"}
    graph = {
        "export": node("PCPOExportLora", **chosen, kind="LoRA", dtype="float16", folder="output")
    }
    first = Path(server.run(graph)["export"]["text"][0])
    graph["export"]["inputs"]["dtype"] = "bfloat16"
    second = server.run(graph)["export"]["text"][0]
    assert first.parent == server.folder / "output" / "loras" and first.name == "mine.safetensors"
    assert "mine-2.safetensors (mine was taken)" in second
    with safe_open(first, framework="pt") as opened:
        assert opened.metadata()["pcpo_job"] == job["id"]
        weights = [key for key in load_file(first) if not key.endswith(".alpha")]
        assert {opened.get_slice(key).get_dtype() for key in weights} == {"F16"}
    graph["export"]["inputs"]["iteration"] = 3
    assert "has no LoRA of iteration 3; it has 2, 4" in error_of(server, graph)


def test_a_guard_ends_a_job_that_collapses(server):
    asked = {"guard_every": 1, "guard_prompts": 4, "guard_images": 2, "guard_patience": 1}
    graph = training("guarded", optimizer_lr=0.5, guard_max_drift=0.01, **asked)
    graph["scene"] = node("PCPOReward", reward="scene", weights="automatic", options="")
    graph["train"]["inputs"]["guard_reward"] = ["scene", 0]
    id = started(server, graph)
    job = wait(server, id, "done")
    assert job["iteration"] == 1 and job["of"] == 4
    assert job["message"].startswith("ended by the guard at iteration 1: drift in pixels is ")
    assert "no iteration was within the bounds" in job["message"]
    assert job["guard"]["values"]["guard_second"]["name"] == "scene"
    assert job["metrics"][0]["guard_strikes"] == 1
    graph["train"]["inputs"]["guard_reward"] = ["reward", 0]
    assert "which is trained on and rises" in error_of(server, graph)


def test_running_again_starts_nothing_twice_and_goes_on_with_what_was_stopped(server):
    graph = training("again", run_iterations=400)
    dry = {**graph, "train": node("PCPOTrainInBackground", **graph["train"]["inputs"])}
    dry["train"]["inputs"]["dry_run"] = True
    dry["show"] = node("PCPOJob", job="newest job", from_job=["train", 0])  # has nothing to show
    before = sorted(jobs_of(server).glob("*/"))
    outputs = server.run(dry)
    cost = (
        r"dry run: about .+, [\d.]+ of [\d.]+ GB of memory, \d+ MB on disk\.\nAll is .* started\."
    )
    assert re.fullmatch(cost, outputs["train"]["text"][0]) and "show" not in outputs
    assert sorted(jobs_of(server).glob("*/")) == before

    id = started(server, graph)
    wait(server, id, "running")
    said = server.run(graph)["train"]["text"][0]
    assert id in said and "it is there already (running): its inputs are unchanged" in said
    wait(server, id, "running")
    end = time.monotonic() + 100
    while server.get(f"/pcpo/jobs/{id}")["iteration"] < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert server.post(f"/pcpo/jobs/{id}/stop_now", {})["job"]["state"] in ("stopping", "stopped")
    stopped = wait(server, id, "stopped")
    assert stopped["iteration"] >= 2 and stopped["message"].startswith("stopped as asked")
    assert "it was stopped and goes on" in server.run(graph)["train"]["text"][0]
    assert wait(server, id, "running")["iteration"] >= stopped["iteration"]

    graph["train"]["inputs"]["train_again"] = True
    second = started(server, graph)
    assert second != id and server.get(f"/pcpo/jobs/{second}")["name"] == "again-2"
    graph["train"]["inputs"] |= {"train_again": False, "name": "other"}
    third = started(server, graph)
    assert third not in (id, second)
    for one in (third, second, id):
        server.post(f"/pcpo/jobs/{one}/stop", {})
        wait(server, one, "stopped")


def test_the_easy_node_makes_the_job_that_the_full_one_makes(server):
    graph = training("easy", preset="demo") | {
        "reward": node("PCPOReward", reward="scene", weights="automatic", options=""),
        "settings": node("PCPOTrainingSettings", preset="demo"),
    }
    given = {name: graph["train"]["inputs"][name] for name in ("model", "clip", "vae", "name")}
    given |= {"reward": "scene", "prompts": "", "how_long": "usual"}
    id = started(server, parts() | {"train": node("PCPOTrainEasy", **given)})
    server.post(f"/pcpo/jobs/{id}/stop", {})
    wait(server, id, "stopped")
    graph["train"]["inputs"]["on_server_exit"] = "continue"
    said = server.run(graph)["train"]["text"][0]
    assert f"job {id}: " in said and "its inputs are unchanged" in said
    server.post(f"/pcpo/jobs/{id}/stop", {})
    wait(server, id, "stopped")


# --- jobs beside each other ----------------------------------------------------------------------


def test_two_jobs_of_one_name_wait_in_line_and_stop_and_are_deleted(server):
    first = started(server, training("twice", run_iterations=500))
    second = started(server, training("twice", run_iterations=2))
    about = server.get(f"/pcpo/jobs/{second}")
    assert (about["name"], about["state"]) == ("twice-2", "queued")
    wait(server, first, "running")
    server.post(f"/pcpo/jobs/{first}/pause", {})
    wait(server, first, "paused")
    assert server.get(f"/pcpo/jobs/{second}")["state"] == "queued"  # the device is not free
    server.post(f"/pcpo/jobs/{first}/continue", {})
    wait(server, first, "running")
    refused = server.post(f"/pcpo/jobs/{first}/delete", {})["error"]
    assert "stop it first" in refused
    server.post(f"/pcpo/jobs/{first}/stop", {})
    wait(server, first, "stopped")
    wait(server, second, "done")
    loras = server.folder / "models" / "loras"
    assert (loras / "twice.safetensors").exists() and (loras / "twice-2.safetensors").exists()
    server.post(f"/pcpo/jobs/{first}/delete", {})
    assert not (jobs_of(server) / first).exists() and (loras / "twice.safetensors").exists()


def test_a_lora_folder_that_cannot_be_written_to_costs_nothing(server):
    id = started(server, training("kept", run_iterations=40))
    wait(server, id, "running")
    loras = server.folder / "models" / "loras"
    away = loras.rename(loras.with_name("elsewhere"))
    loras.write_text("no folder any more")
    try:
        end = time.monotonic() + 200
        while not (said := server.get(f"/pcpo/jobs/{id}"))["message"]:
            assert time.monotonic() < end
            time.sleep(0.2)
        assert "could not be written" in said["message"] and said["state"] == "running"
        assert said["exports"]
    finally:
        loras.unlink()
        away.rename(loras)
    server.post(f"/pcpo/jobs/{id}/stop", {})
    wait(server, id, "stopped")
    assert (loras / "kept.safetensors").exists()


# --- stock checkpoints ---------------------------------------------------------------------------

needs_checkpoints = needs_models("checkpoints/tiny_sd15.safetensors")
ONCE = {"run_iterations": 1, "run_save_every": 1, "model_width": 64, "model_height": 64}


@needs_checkpoints
@pytest.mark.parametrize("has_lora", [False, True], ids=["plain", "with a LoRA"])
def test_a_stock_checkpoint_is_trained(server, has_lora):
    lora = server.folder / "models" / "loras" / "of_queries.safetensors" if has_lora else None
    if lora is not None:
        write_lora(lora, "sd15")
    graph = training(
        "stock", parts("tiny_sd15.safetensors", lora and lora.name), "a cat\na dog\n", **ONCE
    )
    graph["settings"]["inputs"]["preset.prompts_per_iteration"] = 2
    id = started(server, graph)
    job = wait(server, id, "done")
    copies = list((jobs_of(server) / id).glob("model.safetensors"))
    assert bool(copies) == has_lora
    loaded = copies[0] if copies else MODELS / "checkpoints" / "tiny_sd15.safetensors"
    assert Path(job["config"]["model"]["source"]).resolve() == loaded.resolve()


@needs_checkpoints
@pytest.mark.parametrize("preset", ["demo", "setting1"])  # the second by its former name
def test_a_preset_of_another_family_is_refused(server, preset):
    told = error_of(server, training("other", parts("tiny_sd35.safetensors"), preset=preset))
    assert "is for SD1.x models and this MODEL is SD3.5; choose one of demo-flow" in told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../up"}, "the LoRA name '../up' has / in it"),
        ({"name": " "}, "cannot be a file's"),
        ({"continue_from": "gone.safetensors"}, "gone.safetensors"),
    ],
    ids=["path", "empty", "gone"],
)
def test_what_the_node_refuses(server, change, said):
    graph = training("refused")
    graph["train"]["inputs"] |= change
    answer = server.post("/prompt", {"prompt": graph, "client_id": "tests"})
    if answer.get("node_errors"):  # a choice that is not in the list is refused by ComfyUI itself
        assert said in str(answer["node_errors"])
    else:
        assert said in error_of(server, graph)


@pytest.mark.parametrize(
    ("settings", "text", "said"),
    [
        ({"sampler_transition": "flow_sde"}, "", "for flow models; SD1.x is a diffusion model"),
        ({"method_ratio": "density", "method_credit": "proportionate"}, "", "method"),
        ({}, "word " * 90, "too long for the text encoder"),
        ({}, "an embedding:thing of a cat", "embedding"),
    ],
    ids=["transition", "method", "long prompt", "embedding"],
)
def test_settings_and_prompts_that_cannot_be(server, settings, text, said):
    assert said in error_of(server, training("refused", None, text, **settings))
