"""The frontend shows nodes in the user's language: names and tooltips of all settings.

What it needs is in comfyui_fixture.py, and playwright's Python client and a Chromium.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from comfyui_fixture import HOST, needs_host
from comfyui_server_fixture import PACK, Server, choose
from test_comfyui_workflows import APP, frontend

__all__ = ["frontend"]
pytestmark = needs_host
LANGUAGE = "zh"
SETTINGS = f"""() => {{ {APP}
    const node = LiteGraph.createNode("PCPOTrainingSettings");
    app.graph.add(node);
    return node.widgets.map(({{ name, label, tooltip }}) => [name, label, tooltip ?? null]);
}}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    choose(folder, Locale=LANGUAGE)
    with Server(HOST, folder) as started:
        yield started


def test_settings_have_the_languages_names_and_no_tooltip_hides_its_own(frontend):
    """A tooltip that a widget has itself is shown before that of the locale."""
    names = json.loads((PACK / "locales" / LANGUAGE / "nodeDefs.json").read_text("utf-8"))
    known = names["PCPOTrainingSettings"]["inputs"]
    found = frontend.evaluate(SETTINGS)
    assert len(found) > 50
    for name, label, tooltip in found:
        assert label == known[name.replace(".", "_")]["name"]
        assert tooltip is None, name
