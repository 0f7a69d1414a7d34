"""All nodes in both ways in which ComfyUI draws them: its canvas, and Nodes 2.0.

What it needs is in comfyui_fixture.py, and playwright's Python client and a Chromium.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from comfyui_fixture import HOST, needs_host
from comfyui_server_fixture import Server, choose
from test_comfyui_workflows import APP, LOADED, NAMES, QUEUED, frontend, newest, workflow

__all__ = ["frontend"]
pytestmark = needs_host
MODES = {"canvas": False, "Nodes 2.0": True}
CHOSEN = f"""async (mode) => {{ {APP}
    app.graph.clear();
    await app.extensionManager.setting.set("Comfy.VueNodes.Enabled", mode);
}}"""
PLACED = f"""() => {{ {APP}
    const types = Object.keys(LiteGraph.registered_node_types).filter((t) => t.startsWith("PCPO"));
    for (const [i, type] of types.entries()) {{
        const node = LiteGraph.createNode(type);
        node.pos = [420 * (i % 6), 700 * Math.floor(i / 6)];
        app.graph.add(node);
    }}
    app.canvas.ds.scale = 0.25;
    app.canvas.ds.offset = [100, 100];
    app.canvas.setDirty(true, true);
    return types.length;
}}"""
SHOWN = """() => [...document.querySelectorAll("pre[aria-label=scores]")]
    .map((table) => [table.textContent, table.getBoundingClientRect().height])"""
DRY = f"""(iterations) => {{ {APP}
    const set = (type, name, value) => {{
        const node = app.graph._nodes.find((node) => node.type === type);
        node.widgets.find((widget) => widget.name === name).value = value;
    }};
    set("PCPOTrainInBackground", "dry_run", true);
    set("PCPOTrainingSettings", "preset.run_iterations", iterations);
}}"""
CUT = """(said) => {
    const found = [...document.querySelectorAll("body *")].filter((at) =>
        at.textContent.includes(said)
        && ![...at.children].some((child) => child.textContent.includes(said)));
    const cuts = (at) => at.scrollHeight > at.clientHeight + 2
        && ["auto", "scroll", "hidden"].includes(getComputedStyle(at).overflowY);
    const above = (at) => at.closest("[data-node-id], .dom-widget, body") ?? document.body;
    return found.map((at) => {
        const end = above(at);
        while (at && at !== end && !cuts(at)) at = at.parentElement;
        return at !== end;
    });
}"""
OVERLAPS = f"""() => {{ {APP}
    const {{ scale }} = app.canvas.ds;
    const boxes = [...document.querySelectorAll("[data-node-id]")].map((node) =>
        [node.dataset.nodeId, node.getBoundingClientRect()]);
    const isOver = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 3 * scale
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > scale;
    return boxes.flatMap(([one, a], i) => boxes.slice(i + 1)
        .filter(([, b]) => isOver(a, b)).map(([other]) => [one, other]));
}}"""
CHANGED = f"""async () => {{ {APP}
    const node = LiteGraph.createNode("PCPOTrainingSettings");
    app.graph.add(node);
    const names = () => node.widgets.map((widget) => widget.name);
    const before = names();
    node.widgets[0].value = "sdxl-12gb";
    node.widgets[0].callback?.("sdxl-12gb");
    const {{ output }} = await app.graphToPrompt();
    return {{ before, after: names(), inputs: output[node.id].inputs }};
}}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    choose(folder)
    with Server(HOST, folder) as started:
        yield started


@pytest.fixture
def said(frontend) -> Iterator[list[str]]:
    """Errors in the browser's console."""
    errors: list[str] = []

    def hear(message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            errors.append(message.text)

    frontend.on("console", hear)
    yield errors
    frontend.remove_listener("console", hear)


@pytest.mark.parametrize("mode", MODES)
def test_every_node_is_drawn(frontend, said, mode):
    frontend.evaluate(CHOSEN, MODES[mode])
    count = frontend.evaluate(PLACED)
    assert count > 25
    if MODES[mode]:
        frontend.wait_for_function(
            f"() => document.querySelectorAll('[data-node-id]').length >= {count}"
        )
    frontend.wait_for_timeout(1000)
    assert not said


@pytest.mark.parametrize("mode", MODES)
def test_a_preset_changes_the_settings(frontend, said, mode):
    frontend.evaluate(CHOSEN, MODES[mode])
    changed = frontend.evaluate(CHANGED)
    assert changed["before"] != changed["after"]
    assert changed["inputs"]["preset"] == "sdxl-12gb"
    assert str(changed["inputs"]["preset.model_width"]) == "768"
    assert not said


@pytest.mark.parametrize("mode", MODES)
def test_the_scores_are_shown_on_the_node(server, frontend, said, mode):
    frontend.evaluate(CHOSEN, MODES[mode])
    frontend.evaluate(LOADED, workflow("01 Start here - sample and score"))
    before = set(server.get("/history"))
    frontend.evaluate(QUEUED)
    assert newest(server, before)["status"]["status_str"] == "success"
    frontend.wait_for_function(f"() => ({SHOWN})().some(([text, height]) => text && height > 40)")
    ((text, _),) = frontend.evaluate(SHOWN)
    assert text.splitlines()[0].split()[:3] == ["rank", "image", "score"]
    assert len(text.splitlines()) == 13
    assert not said


@pytest.mark.parametrize("mode", MODES)
def test_the_text_of_a_node_is_shown_whole(server, frontend, said, mode):
    frontend.evaluate(CHOSEN, MODES[mode])
    frontend.evaluate(LOADED, workflow("03 Train a LoRA"))
    frontend.evaluate(DRY, 3 + MODES[mode])  # a node that is not run again says nothing
    before = set(server.get("/history"))
    frontend.evaluate(QUEUED)
    assert newest(server, before)["status"]["status_str"] == "success"
    for end in ("beside ComfyUI's", "nothing was started."):
        shown = f"(said) => ({CUT})(said).includes(false)"
        frontend.wait_for_function(shown, arg=end, polling=500)
    assert not said


def test_no_nodes_of_a_template_overlap_in_nodes_2(frontend, said):
    frontend.evaluate(CHOSEN, MODES["Nodes 2.0"])
    found: dict[str, Any] = {}
    for name in NAMES:
        graph = workflow(name)
        frontend.evaluate(LOADED, graph)
        drawn = "(count) => document.querySelectorAll('[data-node-id]').length === count"
        frontend.wait_for_function(drawn, arg=len(graph["nodes"]))
        frontend.wait_for_timeout(700)
        if over := frontend.evaluate(OVERLAPS):
            found[name] = over
    assert not found
    assert not said
