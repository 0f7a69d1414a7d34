"""Every shipped workflow in real ComfyUI: posted to it, then opened and queued in the frontend.

What it needs is in comfyui_fixture.py. The workflows of SD1.5, SDXL, SD3.5 and FLUX run on the tiny
checkpoints, which are given the names that the workflows ask for, those of Z-Image and FLUX.2
[klein] on small files that are made here; their LoRAs are random. Workflows
that train do so for two iterations of few pictures, and are then used as their notes say; rewards
that are networks are tried once without their weights, and then another one stands in for them. The
browser needs playwright's Python client and a Chromium.
"""

from __future__ import annotations

import json
import runpy
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui_fixture import HOST, MODELS, PACK, needs_host, write_lora
from comfyui_pcpo.pcpo.pretrained.catalogue import of_reward
from comfyui_pcpo.tests.fixtures import host_files_fixture as files
from comfyui_pcpo.trainers.taste.store import Store
from comfyui_server_fixture import Server, choose
from PIL import Image

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
NAMES = [file.stem for file in WORKFLOWS]
NAME = "ComfyUI-PCPO"
BLUEPRINTS = runpy.run_path(str(PACK / "docs" / "write_blueprints.py"))
all_nodes, expanded = BLUEPRINTS["all_nodes"], BLUEPRINTS["expanded"]
SMALL = Path(__file__).parent / "scripts" / "small_models.py"

pytestmark = needs_host
FILES = {
    "CheckpointLoaderSimple": ("checkpoints", "tiny_{family}"),
    "UNETLoader": ("diffusion_models", "tiny_{family}"),
    "CLIPLoader": ("text_encoders", "tiny_clip_l"),
    "VAELoader": ("vae", "tiny_ae16"),
}
SDXL = "tiny_sdxl.ckpt"
MADE = {
    "zimage": {"UNETLoader": files.ZIMAGE, "CLIPLoader": files.QWEN},
    "klein": {"UNETLoader": files.KLEIN, "CLIPLoader": files.QWEN, "VAELoader": files.VAE},
}
"""Small files, with endings by which ComfyUI reads them."""
TRAINS = "PCPOTrainInBackground"
QUICK = {
    "run_iterations": 2,
    "run_save_every": 2,
    "run_micro_batch": 4,
    "run_eval_prompts": 2,
    "run_eval_steps": 2,
    "prompts_per_iteration": 2,
    "prompts_images_per_prompt": 2,
    "sampler_steps": 3,
    "optimizer_updates": 1,
    "model_precision": "float32",
    "model_width": "64",
    "model_height": "64",
    "taste_ask_every": 1,
}
"""Settings of a training that takes seconds."""

APP = "const app = window.comfyAPI?.app?.app ?? window.app;"
READY = f"() => {{ {APP} return app?.graph && LiteGraph.registered_node_types.PCPODemoModel; }}"
LOADED = f"""async (workflow) => {{ {APP}
    await app.loadGraphData(workflow);
    const nodes = app.graph.nodes ?? app.graph._nodes;
    const missing = nodes.filter((n) => !LiteGraph.registered_node_types[n.type]);
    return {{ missing: missing.map((n) => n.type), prompt: (await app.graphToPrompt()).output }};
}}"""
OPENED = f"""async (workflow) => {{ {APP}
    await app.loadGraphData(workflow, true, true, null, {{ openSource: "template" }});
    return {{ scale: app.canvas.ds.scale, offset: [...app.canvas.ds.offset] }};
}}"""
QUEUED = f"async () => {{ {APP} await app.queuePrompt(0, 1); }}"


FAMILIES = {
    **{"FLUX.1": "flux", "FLUX.2 klein": "klein", "SD 1.5": "sd15", "SD 3.5": "sd35"},
    **{"SDXL": "sdxl", "Z-Image": "zimage"},
}


def family_of(name: str) -> str:
    return FAMILIES.get(name.partition(" - ")[0], "demo")


def trains(graph: dict[str, Any]) -> bool:
    return any(node["type"] == TRAINS for node in graph["nodes"])


def workflow(name: str) -> dict[str, Any]:
    """A workflow as it is shipped, on small latents in few steps where it is not the demo's."""
    graph = json.loads((PACK / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in all_nodes(graph):
        if node["type"] == "PCPOTrainingSettings":
            node.pop("widgets_values_named", None)
            widgets = [i["name"].removeprefix("preset.") for i in node["inputs"]]
            for widget, value in QUICK.items():
                node["widgets_values"][widgets.index(widget)] = value
    if family_of(name) == "demo":
        return graph
    for node in all_nodes(graph):
        node.pop("widgets_values_named", None)  # the frontend may prefer them
        values = node.get("widgets_values")
        made = MADE.get(family_of(name), {})
        if node["type"].startswith("Empty"):
            values[:2] = 64, 64
        elif node["type"] == "PrimitiveInt":
            values[0] = 64
        elif node["type"] == "Flux2Scheduler":
            values[:] = 3, 64, 64
        elif node["type"] in made:
            values[0] = Path(made[node["type"]]).name
        elif node["type"] == "PCPOScheduler":
            values[0] = 3
        elif node["type"] in {"PCPOCompareModels", "PCPODrawPrompts"}:
            widgets = [i["name"] for i in node["inputs"] if "widget" in i]
            small = {"prompts": "a fox", "width": 64, "height": 64}
            for widget, value in small.items():
                values[widgets.index(widget)] = value
        elif node["type"] == "CheckpointLoaderSimple" and family_of(name) == "sdxl":
            values[0] = SDXL  # pickled, so that ComfyUI reads it by its ending
        elif node["type"] == "PCPOPrompts" and family_of(name) in {"sdxl", *MADE}:
            text = "source.text"  # few: the text encoders have their full size
            node["inputs"].append({"name": text, "type": "STRING", "widget": {"name": text}})
            node["widgets_values"] = ["text", "a cat\na dog\na hill\na tree"]
        elif node["type"] == "DualCLIPLoader":  # T5 has no small form; the tiny FLUX needs none
            node["type"] = "CLIPLoader"
            kept = {"clip_name1": "clip_name", "type": "type", "device": "device"}
            node["inputs"] = [
                {**given, "name": kept[given["name"]], "widget": {"name": kept[given["name"]]}}
                for given in node["inputs"]
                if given["name"] in kept
            ]
            node["properties"] = {"Node name for S&R": "CLIPLoader"}
            node["widgets_values"] = [values[0], "stable_diffusion", "default"]
    return graph


def place_files(models: Path) -> None:
    """Give the tiny checkpoints the names that the workflows ask for; a LoRA is its family's."""
    for name in NAMES:
        family = family_of(name)
        for node in all_nodes(workflow(name)) if family != "demo" else ():
            if node["type"] not in {*FILES, "PCPOTunedLora"}:
                continue
            folder, source = FILES.get(node["type"], ("loras", ""))
            wanted = models / folder / node["widgets_values"][0]
            wanted.parent.mkdir(parents=True, exist_ok=True)
            if node["type"] == "PCPOTunedLora":
                write_lora(wanted, family)
            elif source and not wanted.exists():
                tiny = f"{source.format(family=family)}{Path(wanted).suffix}"
                wanted.symlink_to(MODELS / folder / tiny)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    files.write_files(folder / "models")
    place_files(folder / "models")
    choose(folder)
    both = ("--whitelist-custom-nodes", NAME, SMALL.name)
    made = Server(HOST, folder, *both)
    (folder / "custom_nodes" / SMALL.name).symlink_to(SMALL)
    with made as started:
        yield started


def networks(graph: dict[str, Any]) -> list[str]:
    """The rewards of a graph that need weights, which no server of these tests has."""
    chosen = [n["widgets_values"][0] for n in all_nodes(graph) if n["type"] == "PCPOReward"]
    return [reward for reward in chosen if of_reward(reward)]


def with_stand_in(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with a reward that needs no weights."""
    for node in all_nodes(graph):
        if node["type"] == "PCPOReward" and of_reward(node["widgets_values"][0]):
            node["widgets_values"][0] = "jpeg_incompressibility"
            node.pop("widgets_values_named", None)
    return graph


def ready(server: Server, name: str) -> dict[str, Any]:
    """The workflow, once the server has its files."""
    family = family_of(name)
    if family == "demo":
        return workflow(name)
    needed = f"checkpoints/{SDXL}" if family == "sdxl" else "vae/tiny_ae16.safetensors"
    if not (MODELS / needed).is_file():
        pytest.skip(f"PCPO_TINY_MODELS names no folder with {needed} and what it comes with")
    graph = workflow(name)
    for node in graph["nodes"]:
        if node["type"] == "PCPOTunedLora":  # all families ask for the same names
            write_lora(server.folder / "models" / "loras" / node["widgets_values"][0], family)
    return graph


def voted(server: Server, run: Callable[..., Any], graph: dict[str, Any]) -> dict[str, Any]:
    """A graph that trains on a taste, as its note says to go on after voting: what draws and what
    trains is on, what compares is not. Other graphs stay as they are."""
    rates = [node for node in graph["nodes"] if node["type"] == "PCPORateImages"]
    if not rates:
        return graph
    run(graph)
    name = rates[0]["widgets_values"][0]
    store = Store(server.folder / "user" / "__pcpo" / "tastes" / name)
    if not store.votes():  # the second time its images are known
        assert len(store.waiting()) >= 30
    for pair in store.waiting():
        store.vote(pair, "left" if pair.left > pair.right else "right")
    later = {"PCPOLoadJobLora", "PCPOCompareModels", "PreviewImage"}
    nodes = [{**node, "mode": 2 if node["type"] in later else 0} for node in graph["nodes"]]
    return {**graph, "nodes": nodes}


def turned(graph: dict[str, Any]) -> dict[str, Any]:
    """A graph that has trained, as its note says to go on: training muted, the rest not."""
    nodes = [
        {**node, "mode": 2 if node["type"] in {TRAINS, "PCPOWaitForJob"} else 0}
        for node in graph["nodes"]
    ]
    return {**graph, "nodes": nodes}


def posted(server: Server, graph: dict[str, Any]) -> dict[str, Any]:
    """A graph of the frontend as a client posts it."""
    graph = expanded(graph)
    unused = {n["id"] for n in graph["nodes"] if n["mode"] or n["type"] == "MarkdownNote"}
    links = [link for link in graph["links"] if link[1] not in unused]
    sources = {link: [str(node), slot] for link, node, slot, *_ in links}
    prompt = {}
    for node in graph["nodes"]:
        if node["id"] in unused:
            continue
        known = server.get(f"/object_info/{node['type']}")[node["type"]]["input"]
        known = known.get("required", {}) | known.get("optional", {})
        values, inputs = iter(node.get("widgets_values") or []), {}
        for given in node["inputs"]:
            name = given["name"]
            if "widget" in given:
                inputs[name] = next(values)
                if any(about.get("control_after_generate") for about in known.get(name, ())[1:]):
                    assert next(values) == "fixed"
            if given.get("link") in sources:
                inputs[name] = sources[given["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def pictures(server: Server, outputs: dict[str, Any]) -> Iterator[np.ndarray]:
    for output in outputs.values():
        for image in output.get("images", []):
            file = server.folder / image["type"] / image["subfolder"] / image["filename"]
            with Image.open(file) as opened:
                yield np.asarray(opened.convert("RGB"))


@contextmanager
def trained(server: Server) -> Iterator[None]:
    """Once the newest job has ended well, with its LoRA in models/loras; both are gone after."""
    job = server.get("/pcpo/jobs")["jobs"][0]
    end = time.monotonic() + 300
    while job["state"] in {"queued", "preparing", "running"}:
        assert time.monotonic() < end, job
        time.sleep(0.3)
        job = server.get(f"/pcpo/jobs/{job['id']}")
    file = server.folder / "models" / "loras" / f"{job['name']}.safetensors"
    assert job["state"] == "done" and file.is_file(), job
    yield
    (only,) = server.get("/pcpo/jobs")["jobs"]  # so using a job has started no other
    while "error" in server.post(f"/pcpo/jobs/{only['id']}/delete", {}):
        assert time.monotonic() < end  # its process may take a moment to end
        time.sleep(0.3)
    file.unlink()


@pytest.mark.parametrize("name", [name for name in NAMES if networks(workflow(name))])
def test_what_a_reward_lacks_is_said_before_anything_is_started(server, name):
    graph = ready(server, name)
    (reward,) = networks(graph)
    answer = server.post("/prompt", {"prompt": posted(server, graph), "client_id": "tests"})
    found = [fault for fault in answer["node_errors"].values() if fault["errors"]]
    assert {fault["class_type"] for fault in found} == {"PCPOReward"}
    said = found[0]["errors"][0]["details"].partition(" - ")[2]
    assert f"the reward {reward!r} needs " in said and "\n" not in said
    assert f"trainers rewards get {reward}`" in said and "models/reward_models" in said
    assert not server.get("/pcpo/jobs")["jobs"]


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs(server, name):
    graph = with_stand_in(ready(server, name))
    begin = time.monotonic()
    graph = voted(server, lambda first: server.run(posted(server, first)), graph)
    outputs = server.run(posted(server, graph))
    if trains(graph):
        with trained(server):
            outputs = server.run(posted(server, turned(graph)))
    print(f"{name}: {time.monotonic() - begin:.1f} s")
    shown = list(pictures(server, outputs))
    assert shown and all(picture.std() > 1 for picture in shown)


def test_templates_help_and_texts_are_served(server):
    assert sorted(server.get("/workflow_templates")[NAME]) == NAMES
    for name in NAMES:
        base = f"/api/workflow_templates/{NAME}/{urllib.parse.quote(name)}"
        assert server.get(f"{base}.json")["nodes"]
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{base}.jpg") as answer:
            assert answer.read(3) == b"\xff\xd8\xff"
    texts = server.get("/i18n")["en"]["nodeDefs"]
    nodes = {name for name in server.get("/object_info") if name.startswith("PCPO")}
    assert nodes == {name for name in texts if name.startswith("PCPO")}
    for name in nodes:
        page = f"http://127.0.0.1:{server.port}/extensions/{NAME}/docs/{name}.md"
        with urllib.request.urlopen(page) as answer:
            assert answer.read().startswith(b"# PCPO ")


# --- in the browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frontend(server) -> Iterator[Any]:
    """The frontend's page; at the end nothing may have been raised in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    raised: list[str] = []
    with playwright.sync_playwright() as started:
        found = shutil.which("chromium") or shutil.which("google-chrome")
        try:
            browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(180_000)
        page.on("pageerror", lambda error: raised.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.port}")
        page.wait_for_function(READY)
        page.wait_for_timeout(2000)  # the frontend opens its own first workflow
        yield page
        browser.close()
    assert not raised


def queue(server: Server, frontend: Any, graph: dict[str, Any]) -> None:
    """Open a graph in the frontend and run it."""
    loaded = frontend.evaluate(LOADED, graph)
    assert loaded["missing"] == []
    prompt = {
        key: {k: node[k] for k in ("class_type", "inputs")}
        for key, node in loaded["prompt"].items()
    }
    assert prompt == posted(server, graph)  # so no link is lost, and no widget has another's value
    before = set(server.get("/history"))
    frontend.evaluate(QUEUED)
    history = newest(server, before)
    assert history["status"]["status_str"] == "success", history["status"]["messages"]


def newest(server: Server, before: set[str]) -> dict[str, Any]:
    """What has ended since."""
    end = time.monotonic() + 300
    while not (new := server.get("/history").keys() - before):
        assert time.monotonic() < end, server.log()[-3000:]
        time.sleep(0.3)
    return server.get("/history")[new.pop()]


def test_a_workflow_whose_preset_has_a_former_name_is_opened(frontend):
    graph = workflow("SD 1.5 - 2 Train a LoRA")
    (node,) = (node for node in graph["nodes"] if node["type"] == "PCPOTrainingSettings")
    node["widgets_values"][:2] = "setting1", 7
    prompt = frontend.evaluate(LOADED, graph)["prompt"]
    inputs = prompt[str(node["id"])]["inputs"]
    assert (inputs["preset"], inputs["preset.run_iterations"]) == ("sd15-aesthetic", 7)


def test_templates_are_listed_by_name(frontend):
    listed = frontend.evaluate("() => window.comfyAPI.api.api.getWorkflowTemplates()")
    assert listed[NAME] == NAMES


def test_what_is_set_on_a_box_reaches_the_nodes_inside(frontend):
    frontend.evaluate(LOADED, workflow("FLUX.2 klein - 1 Sample and score"))
    prompt = frontend.evaluate(f"""async () => {{ {APP}
        const box = app.graph.nodes.find((node) => node.subgraph);
        for (const widget of box.widgets) if (widget.label === "width") widget.value = 640;
        return (await app.graphToPrompt()).output;
    }}""")
    values = {id: node["inputs"].get("value") for id, node in prompt.items()}
    drawn = [node["inputs"]["width"] for node in prompt.values() if "width" in node["inputs"]]
    assert len(drawn) == 2 and {values[link[0]] for link in drawn} == {640}


@pytest.mark.parametrize("name", [n for n in NAMES if family_of(n) in {"sdxl", *MADE}])
def test_a_template_opens_at_its_own_view_which_comfyui_leaves_aside(frontend, name):
    graph = workflow(name)
    view = frontend.evaluate(OPENED, graph)
    assert view | {"pcpo": True} == graph["extra"]["ds"]


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs_in_the_frontend(server, frontend, name):
    graph = with_stand_in(ready(server, name))
    graph = voted(server, partial(queue, server, frontend), graph)
    queue(server, frontend, graph)
    if trains(graph):
        with trained(server):
            queue(server, frontend, turned(graph))


def test_a_graph_of_before_has_words_for_numbers_and_defaults_of_new_widgets(frontend):
    graph = workflow("11 Which steps get the credit")
    (node,) = (n for n in graph["nodes"] if n["type"] == "PCPOCreditWeights")
    node["inputs"], node["widgets_values"] = node["inputs"][:-2], ["ddim", 0.5, 2]
    inputs = frontend.evaluate(LOADED, graph)["prompt"][str(node["id"])]["inputs"]
    assert {k: inputs[k] for k in ("transition", "noise_level", "untrained_last_steps")} == {
        "transition": "ddim",
        "noise_level": "0.5",
        "untrained_last_steps": "2",
    }
    assert (inputs["credit"], inputs["solve_weight"]) == ("proportionate", "auto")
    node["widgets_values"] = ["ddim", -1, -1]
    inputs = frontend.evaluate(LOADED, graph)["prompt"][str(node["id"])]["inputs"]
    assert (inputs["noise_level"], inputs["untrained_last_steps"]) == ("auto", "auto")
