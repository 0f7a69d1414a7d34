"""Z-Image and FLUX.2 [klein] trained from the graph in real ComfyUI, and the LoRA on that model.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comfyui_fixture import HOST, MODELS, needs_host, needs_models
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
from comfyui_pcpo.tests.fixtures import host_files_fixture as files
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_server_fixture import Server

AUTOENCODER, TURBO = "vae/tiny_ae16.safetensors", "diffusion_models/z_image_turbo.ckpt"
SMALL = Path(__file__).parent / "scripts" / "small_models.py"

pytestmark = [needs_host, needs_models(AUTOENCODER)]

ONCE = {
    **{"run_iterations": 2, "run_save_every": 2, "run_eval_prompts": 1, "run_eval_steps": 2},
    **{"prompts_per_iteration": 1, "prompts_images_per_prompt": 2, "run_micro_batch": 2},
    **{"model_width": 64, "model_height": 64, "model_precision": "float32", "model_base": "same"},
    **{"sampler_steps": 4, "sampler_guidance_scale": 2.0},
    "optimizer_lr": 0.05,  # far enough from nothing to be seen after two iterations
}
FAMILIES = {
    "zimage": (files.ZIMAGE, "lumina2", AUTOENCODER),
    "klein": (files.KLEIN, "flux2", files.VAE),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    files.write_files(folder / "models")
    (folder / "models" / AUTOENCODER).symlink_to(MODELS / AUTOENCODER)
    (folder / "models" / TURBO).symlink_to(folder / "models" / files.ZIMAGE)
    (folder / "models" / "loras").mkdir()
    both = ("--whitelist-custom-nodes", "ComfyUI-PCPO", SMALL.name)
    made = Server(HOST, folder, *both)
    (folder / "custom_nodes" / SMALL.name).symlink_to(SMALL)
    with made as running:
        yield running
    for job in map(JobFolder, jobs_of(running).glob("*")):
        if job.is_held():
            os.kill(job.read("status.json")["pid"], signal.SIGKILL)


def loaded(family: str, dtype: str = "default", network: str = "") -> Graph:
    """What the official workflows load, at nodes "model", "clip" and "vae"."""
    own, kind, vae = FAMILIES[family]
    name = Path(network or own).name
    graph = {
        "model": node("UNETLoader", unet_name=name, weight_dtype=dtype),
        "clip": node("CLIPLoader", clip_name=Path(files.QWEN).name, type=kind),
        "vae": node("VAELoader", vae_name=Path(vae).name),
    }
    if family == "zimage":
        graph["file"] = graph["model"]
        graph["model"] = node("ModelSamplingAuraFlow", model=["file", 0], shift=3.5)
    return graph


def tuned(graph: Graph, lora: str) -> Graph:
    """The same with a LoRA on the MODEL, by the stock loader."""
    loader = node("LoraLoaderModelOnly", model=["plain", 0], lora_name=lora, strength_model=1.0)
    return {**graph, "plain": graph["model"], "model": loader}


def job_of(name: str, graph: Graph, family: str, **settings: Any) -> Graph:
    """A small training of what a graph loads."""
    made = training(name, graph, "a cat\na dog\n", f"{family}-16gb", **ONCE | settings)
    made["train"]["inputs"] |= {part: [part, 0] for part in ("model", "clip", "vae")}
    return made


def pictures(server: Server, graph: Graph, family: str) -> list[bytes]:
    """Pixels that ComfyUI makes with what a graph loads."""
    made = images(["model", 0])
    empty = "EmptyFlux2LatentImage" if family == "klein" else "EmptySD3LatentImage"
    made["empty"] = node(empty, width=64, height=64, batch_size=2)
    made["text"]["inputs"]["clip"], made["decode"]["inputs"]["vae"] = ["clip", 0], ["vae", 0]
    made["sigmas"]["inputs"]["model"] = ["model", 0]
    found = server.run(graph | made)["save"]["images"]
    return [strip((server.folder / "output" / image["filename"]).read_bytes()) for image in found]


def trained(server: Server, name: str, graph: Graph, family: str, **settings: Any) -> JobFolder:
    """The folder of a job that has run to its end."""
    id = started(server, job_of(name, graph, family, **settings))
    wait(server, id, "done")
    folder = JobFolder(jobs_of(server) / id)
    written = server.folder / "models" / "loras" / f"{name}.safetensors"
    assert written.read_bytes() == folder.last_export().read_bytes()
    assert folder.read("job.json")["inputs"]["base"] == family
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_stock_loaders_to_a_lora_in_the_stock_loader(server, family):
    graph, network = loaded(family), FAMILIES[family][0]
    folder = trained(server, family, graph, family)
    config, models = folder.job()["config"], server.folder / "models"
    assert config["model"]["source"] == str(models / network)
    assert config["model"]["text_encoders"] == [str(models / files.QWEN)]
    assert config["model"]["qwen_tokenizer"].endswith("qwen25_tokenizer")
    assert config["sampler"]["shift"] == (3.5 if family == "zimage" else None)
    assert not (folder.root / "model.safetensors").exists()

    logged, lora = len(server.log()), f"{family}.safetensors"
    assert pictures(server, tuned(graph, lora), family) != pictures(server, graph, family)
    assert "not loaded" not in server.log()[logged:]

    fp8 = tuned(loaded(family, "fp8_e4m3fn"), lora)
    again = trained(server, f"{family}_again", fp8, family, run_iterations=1)
    assert again.job()["config"]["model"]["source"] == str(again.root / "model.safetensors")


@pytest.mark.slow
def test_z_image_at_the_width_by_which_comfyui_knows_it(server):
    graph = loaded("zimage", network=files.WHOLE_WIDTH)
    trained(server, "wide", graph, "zimage", run_iterations=1)
    logged = len(server.log())
    after = pictures(server, tuned(graph, "wide.safetensors"), "zimage")
    assert after != pictures(server, graph, "zimage")
    assert "not loaded" not in server.log()[logged:]


def test_a_distilled_model_is_trained_if_that_is_wanted(server):
    graph = loaded("zimage", network=TURBO)
    for given in (graph, tuned(graph, "zimage.safetensors")):  # a copy has another name
        said = error_of(server, job_of("turbo", given, "zimage"))
        assert said.startswith("z_image_turbo.ckpt is distilled to a few steps, by its name: it")
        assert said.endswith("or set model_train_distilled in PCPO Training Settings to true")
    wanted = {"model_train_distilled": True, "run_iterations": 1}
    trained(server, "turbo", tuned(graph, "zimage.safetensors"), "zimage", **wanted)


def test_the_other_model_s_reading_of_qwen_is_refused(server):
    for family, other in (("zimage", "klein"), ("klein", "zimage")):
        graph = loaded(family) | {"clip": loaded(other)["clip"]}
        said = error_of(server, job_of("wrong", graph, family))
        assert "which no" in said and f"type {FAMILIES[family][1]}" in said
