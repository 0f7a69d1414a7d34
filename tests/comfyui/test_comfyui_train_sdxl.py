"""SDXL trained from the graph in real ComfyUI, and its LoRA on the same model.

What it needs is in comfyui_fixture.py, tiny SDXL files among it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

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
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_server_fixture import Server

WHOLE, ZERO_SNR = "tiny_sdxl.ckpt", "tiny_sdxl_vpred_zsnr.ckpt"

pytestmark = [needs_host, needs_models(f"checkpoints/{WHOLE}", f"checkpoints/{ZERO_SNR}")]

ONCE = {
    **{"run_iterations": 2, "run_save_every": 2, "run_eval_prompts": 1, "run_eval_steps": 2},
    **{"prompts_per_iteration": 1, "prompts_images_per_prompt": 2, "run_micro_batch": 2},
    **{"model_width": 64, "model_height": 64, "model_precision": "float32"},
    **{"sampler_steps": 4, "sampler_guidance_scale": 1.0},
    "optimizer_lr": 0.05,  # far enough from nothing to be seen after two iterations
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    for kind in ("checkpoints", "loras"):
        (folder / "models" / kind).mkdir(parents=True)
    for name in (WHOLE, ZERO_SNR):
        (folder / "models" / "checkpoints" / name).symlink_to(MODELS / "checkpoints" / name)
    with Server(HOST, folder) as running:
        yield running
    for job in map(JobFolder, jobs_of(running).glob("*")):
        if job.is_held():
            os.kill(job.read("status.json")["pid"], signal.SIGKILL)


def loaded(file: str) -> Graph:
    """A file's MODEL at node "model"; CLIP and VAE are those of the whole one, at "load"."""
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name=WHOLE),
        "model": node("CheckpointLoaderSimple", ckpt_name=file),
    }


def job_of(name: str, graph: Graph, **settings: object) -> Graph:
    """A small training of what a graph loads."""
    made = training(name, graph, "a cat\na dog\n", "sdxl-12gb", **ONCE | settings)
    made["train"]["inputs"] |= {"model": ["model", 0]}
    return made


def pictures(server: Server, graph: Graph, model: list[object]) -> list[bytes]:
    """Pixels that ComfyUI makes with a MODEL."""
    made = images(model)
    made["sigmas"]["inputs"]["model"] = ["model", 0]
    found = server.run(graph | made)["save"]["images"]
    return [strip((server.folder / "output" / image["filename"]).read_bytes()) for image in found]


@pytest.mark.parametrize("file", [WHOLE, ZERO_SNR])
def test_from_the_stock_loader_to_a_lora_in_the_stock_loader(server, file):
    graph, name = loaded(file), file.removesuffix(".ckpt")
    id = started(server, job_of(name, graph))
    wait(server, id, "done")
    folder, is_v = JobFolder(jobs_of(server) / id), file == ZERO_SNR
    about = folder.job()["config"]["model"]
    assert about["source"] == str(server.folder / "models" / "checkpoints" / file)
    assert about["prediction_type"] == ("v_prediction" if is_v else "epsilon")
    assert about["zero_terminal_snr"] == is_v
    assert not (folder.root / "model.safetensors").exists()

    written = server.folder / "models" / "loras" / f"{name}.safetensors"
    assert written.read_bytes() == folder.last_export().read_bytes()
    logged = len(server.log())
    tuned = {"lora_name": written.name, "strength_model": 1.0}
    graph["tuned"] = node("LoraLoaderModelOnly", model=["model", 0], **tuned)
    assert pictures(server, graph, ["tuned", 0]) != pictures(server, graph, ["model", 0])
    assert "not loaded" not in server.log()[logged:]


def test_a_layer_that_a_clip_lacks_costs_nothing(server):
    graph = job_of("deep", loaded(WHOLE))
    graph["deep"] = node("CLIPSetLastLayer", clip=["load", 1], stop_at_clip_layer=-13)
    graph["train"]["inputs"]["clip"] = ["deep", 0]
    said = error_of(server, graph)
    assert said.startswith(
        "CLIP Set Last Layer is at -13, and the smaller text encoder of SDXL has"
    )
