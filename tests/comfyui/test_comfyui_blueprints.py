"""The blueprints in real ComfyUI: placed from the node library in the browser, wired and run.

What it needs is in comfyui_fixture.py, and playwright's Python client and a Chromium.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_fixture import HOST, PACK, needs_host
from comfyui_server_fixture import Server, choose
from test_comfyui_workflows import APP, QUEUED, frontend, newest

__all__ = ["frontend"]
pytestmark = needs_host
FILES = sorted((PACK / "subgraphs").glob("*.json"))
NAMES = [file.stem for file in FILES]
LORAS = ("my_first_reward", "my_second_reward")
SMALL = {"width": 64, "height": 64, "cfg": 1, "steps": 4}
SET: dict[str, dict[str, Any]] = {
    "Align my model": {"name": "aligned", "how long": "short", "reward": "scene"},
    "Best of 16": {**SMALL, "images": 16, "keep": 2},
    "Is my LoRA better": {**SMALL, "images per prompt": 2, "LoRA": f"{LORAS[0]}.safetensors"},
    "Two rewards, one slider": {**SMALL, "images": 4, "first 0 to 1 second": 0.25},
}
PLACED = f"() => {{ {APP} return app.graph.nodes.filter((node) => node.subgraph).length; }}"
WIRED = f"""(values) => {{ {APP}
    const add = (type) => {{
        const node = LiteGraph.createNode(type);
        app.graph.add(node);
        return node;
    }};
    const box = app.graph.nodes.find((node) => node.subgraph);
    const demo = add("PCPODemoModel");
    for (const [i, {{ name }}] of demo.outputs.entries()) {{
        demo.connect(i, box, box.inputs.findIndex((input) => input.name === name));
    }}
    for (const [i, {{ name, type }}] of box.outputs.entries()) {{
        if (type === "IMAGE") box.connect(i, add("PreviewImage"), 0);
        if (name === "table") box.connect(i, add("PreviewAny"), 0);
        if (type === "MODEL") {{
            const [steps, weights] = [add("PCPOScheduler"), add("PCPOCreditWeights")];
            box.connect(i, steps, 0);
            box.connect(i, weights, 0);
            steps.connect(0, weights, 1);
            weights.connect(0, add("PreviewImage"), 0);
        }}
    }}
    for (const inner of box.subgraph.nodes) {{ // says what a training would cost, and starts none
        const dry = inner.widgets?.find((widget) => widget.name === "dry_run");
        if (dry) dry.value = true;
    }}
    for (const widget of box.widgets) {{
        if (widget.label in values) widget.value = values[widget.label];
    }}
    return box.widgets.map(({{ label }}) => label);
}}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    loras = folder / "models" / "loras"
    loras.mkdir(parents=True)
    for name, reward in zip(LORAS, ("scene", "jpeg_incompressibility"), strict=True):
        source = PACK / "trainers" / "demo" / "loras" / f"{reward}.safetensors"
        shutil.copy(source, loras / f"{name}.safetensors")
    choose(folder)
    with Server(HOST, folder) as started:
        yield started


def test_they_are_served(server):
    served = server.get("/global_subgraphs").items()
    ours = {id: entry["name"] for id, entry in served if "PCPO" in entry["info"]["node_pack"]}
    assert sorted(ours.values()) == NAMES
    for id, name in ours.items():
        (kind,) = json.loads(server.get(f"/global_subgraphs/{id}")["data"])["definitions"][
            "subgraphs"
        ]
        assert kind["name"] == name and kind["category"] == "PCPO" and kind["description"]


@pytest.mark.parametrize("name", NAMES)
def test_a_blueprint_is_placed_wired_and_run(server, frontend, name):
    frontend.evaluate(f"() => {{ {APP} app.graph.clear(); }}")
    library = "Workspace.ToggleSidebarTab.node-library"
    show = f"() => {{ {APP} app.extensionManager.command.execute('{library}'); }}"
    frontend.evaluate(show)
    frontend.get_by_placeholder("Search").first.fill(name)
    frontend.get_by_text(name, exact=True).last.click()
    frontend.mouse.move(800, 300, steps=5)
    frontend.mouse.click(800, 300)
    frontend.wait_for_function(PLACED)
    frontend.evaluate(show)
    labels = frontend.evaluate(WIRED, SET[name])
    assert SET[name].keys() <= {*labels}
    before = set(server.get("/history"))
    frontend.evaluate(QUEUED)
    history = newest(server, before)
    assert history["status"]["status_str"] == "success", history["status"]["messages"]
