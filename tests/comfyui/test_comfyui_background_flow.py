"""Flow models trained from the graph in real ComfyUI: each way of loading them, and the LoRA's use.

What it needs is in comfyui_fixture.py; of the tiny models SD3.5 and FLUX.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import comfy_api_fixture  # noqa: F401 (before the pack's nodes)
import pytest
from comfyui_fixture import HOST, MODELS, needs_host, needs_models
from comfyui_pcpo.nodes.training import settings as training_settings
from comfyui_pcpo.tests.comfyui.test_comfyui_background import (
    Graph,
    error_of,
    images,
    jobs_of,
    node,
    started,
    strip,
    training,
    wait,
)
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_server_fixture import Server

FILES = ("checkpoints/tiny_sd35.safetensors", "diffusion_models/tiny_flux.safetensors")
pytestmark = [needs_host, needs_models(*FILES)]

KINDS = ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae")
ONCE = {
    "run_iterations": 2,
    "run_save_every": 2,
    "run_eval_prompts": 2,
    "run_micro_batch": 4,
    "prompts_per_iteration": 2,
    "prompts_images_per_prompt": 2,
    "model_width": 64,
    "model_height": 64,
    "model_precision": "float32",
}
TEXT = "a cat\na dog\n"


def sd3_files(dtype: str = "default") -> Graph:
    """SD3.5's network alone, with a CLIP and a VAE of files of their own."""
    return {
        "model": node("UNETLoader", unet_name="sd3.safetensors", weight_dtype=dtype),
        "clip": node("CLIPLoader", clip_name="tiny_clip_l.safetensors", type="sd3"),
        "vae": node("VAELoader", vae_name="tiny_ae16.safetensors"),
    }


def flux_files(dtype: str = "default") -> Graph:
    return {
        "model": node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype=dtype),
        "clip": node("CLIPLoader", clip_name="tiny_clip_l.safetensors", type="stable_diffusion"),
        "vae": node("VAELoader", vae_name="tiny_ae16.safetensors"),
    }


def tuned(graph: Graph, lora: str) -> Graph:
    """The same with a LoRA on the MODEL."""
    graph = dict(graph)
    graph["plain"] = graph.pop("model")
    source = {"lora_name": lora, "strength_model": 0.7}
    return graph | {"model": node("LoraLoaderModelOnly", model=["plain", 0], **source)}


WAYS = {
    "tiny-flow": ("demo-flow", {"load": node("PCPODemoModel", demo="tiny-flow")}),
    "sd35 in one file": (
        "sd3",
        {"load": node("CheckpointLoaderSimple", ckpt_name="tiny_sd35.safetensors")},
    ),
    "sd35 in files": ("sd3", sd3_files()),
    "sd35 in fp8": ("sd3", sd3_files("fp8_e4m3fn")),
    "sd35 with a LoRA": ("sd3", tuned(sd3_files(), "sd35_1.safetensors")),
    "flux in files": ("flux", flux_files()),
    "flux in fp8": ("flux", flux_files("fp8_e4m3fn")),
    "flux with a LoRA": ("flux", tuned(flux_files(), "flux_1.safetensors")),
}
"""What is trained, and the nodes that load it."""


def preset_of(family: str) -> str:
    found = training_settings.offered_presets()
    fitting = (name for name in found if training_settings.family_of_preset(name) == family)
    return next(fitting, "") or pytest.skip(f"no preset for {family}")


def sources(graph: Graph) -> dict[str, list[Any]]:
    """Where MODEL, CLIP and VAE come from."""
    names = ("model", "clip", "vae")
    return {k: [k, 0] if k in graph else ["load", i] for i, k in enumerate(names)}


def job_of(name: str, graph: Graph, family: str, **settings: Any) -> Graph:
    """A small training of what a graph loads."""
    preset = preset_of("sd3" if family == "demo-flow" else family)
    made = training(name, graph, TEXT, preset, **ONCE | settings)
    made["train"]["inputs"] |= sources(graph)
    return made


def pictures_of(graph: Graph, model: list[Any]) -> Graph:
    """Two pictures of a MODEL with what else the graph loads."""
    made = images(model)
    made["empty"] = node("EmptySD3LatentImage", width=64, height=64, batch_size=2)
    found = sources(graph)
    made["text"]["inputs"]["clip"] = found["clip"]
    made["decode"]["inputs"]["vae"] = found["vae"]
    made["sigmas"]["inputs"]["model"] = found["model"]
    return graph | made


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("comfyui")
    for kind in KINDS:
        (folder / "models" / kind).mkdir(parents=True)
        for file in (MODELS / kind).iterdir():
            (folder / "models" / kind / file.name).symlink_to(file)
    prefix, tensors = "model.diffusion_model.", load_file(MODELS / FILES[0])
    network = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    save_file(network, folder / "models" / "diffusion_models" / "sd3.safetensors")
    with Server(HOST, folder) as running:
        yield running
    for job in map(JobFolder, jobs_of(running).glob("*")):
        if job.is_held():
            os.kill(job.read("status.json")["pid"], signal.SIGKILL)


@pytest.mark.parametrize("way", WAYS)
def test_from_the_graph_to_a_lora_in_the_graph(server, way):
    base, graph = WAYS[way]
    name = way.replace(" ", "_")
    # far enough from nothing to be seen after two iterations
    id = started(server, job_of(name, graph, base, optimizer_lr=0.05))
    job = wait(server, id, "done")
    folder = JobFolder(jobs_of(server) / id)
    assert folder.read("job.json")["inputs"]["base"] == base
    copied = "LoRA" in way or "fp8" in way
    assert (folder.root / "model.safetensors").is_file() == copied
    assert (job["config"]["model"]["source"] == str(folder.root / "model.safetensors")) == copied
    written = server.folder / "models" / "loras" / f"{name}.safetensors"
    assert written.read_bytes() == folder.last_export().read_bytes()

    logged, source = len(server.log()), sources(graph)["model"]
    chosen = {"job": name, "which": "latest", "iteration": 1, "strength": 1.0}
    loaders = {
        "stock": node(
            "LoraLoaderModelOnly", model=source, lora_name=written.name, strength_model=1.0
        ),
        "ours": node("PCPOLoadJobLora", model=source, **chosen),
    }
    pixels = {}
    for kind in ("base", "stock", "ours"):
        tuner = {"tuned": loaders[kind]} if kind in loaders else {}
        model = ["tuned", 0] if tuner else source
        found = server.run(pictures_of(graph | tuner, model))["save"]["images"]
        saved = [(server.folder / "output" / image["filename"]).read_bytes() for image in found]
        pixels[kind] = [strip(png) for png in saved]
    assert "not loaded" not in server.log()[logged:]
    assert pixels["stock"] == pixels["ours"] != pixels["base"]


def test_a_lora_is_refused_on_another_model(server):
    _, demo = WAYS["tiny-flow"]
    started_id = started(server, job_of("for_the_demo", demo, "demo-flow"))
    wait(server, started_id, "done")
    _, graph = WAYS["sd35 in one file"]
    chosen = {"job": "for_the_demo", "which": "latest", "iteration": 1, "strength": 1.0}
    loader = {"tuned": node("PCPOLoadJobLora", model=["load", 0], **chosen)}
    told = error_of(server, pictures_of(graph | loader, ["tuned", 0]))
    assert "was trained on PCPO Demo Model's tiny-flow, and this MODEL is an SD3.5 model;" in told


def test_the_shift_of_a_node_is_trained_with(server):
    _, demo = WAYS["tiny-flow"]
    graph = demo | {"model": node("ModelSamplingSD3", model=["load", 0], shift=5.0)}
    made = job_of("shifted", graph, "demo-flow")
    said = server.run(made)["train"]["text"][0]
    assert "training uses the MODEL's shift, 5" in said
    job = server.get("/pcpo/jobs")["jobs"][0]["id"]
    assert wait(server, job, "done")["config"]["sampler"]["shift"] == 5.0


def test_a_demo_lora_is_refused_on_the_other_demo_model(server):
    _, demo = WAYS["tiny-flow"]
    loader = {"tuned": node("PCPODemoLora", model=["load", 0], lora="scene", strength=1.0)}
    told = error_of(server, pictures_of(demo | loader, ["tuned", 0]))
    assert told == (
        "no weight of demo LoRA 'scene' fits tiny-flow; choose the other model in PCPO Demo Model"
    )


def test_what_fits_no_flow_model_is_refused(server):
    _, graph = WAYS["sd35 in one file"]
    wrong = job_of("wrong", graph, "sd3", sampler_transition="ddim")
    answer = server.post("/prompt", {"prompt": wrong, "client_id": "tests"})
    assert "sampler_transition" in str(answer["node_errors"])  # it is not in this preset's list
    clip = {"clip": node("CLIPLoader", clip_name="tiny_clip_l.safetensors", type="flux2")}
    told = error_of(server, job_of("wrong", graph | clip, "sd3"))
    assert "this CLIP is SD1ClipModel, which no SD3.5 reads; connect" in told
