"""The shipped workflows, help pages and English texts, held to the nodes' schemas."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy_api_fixture
import comfyui_pcpo
import pytest
from comfyui_pcpo.pcpo.pretrained.catalogue import of_reward
from PIL import Image

ROOT = Path(comfyui_pcpo.__path__[0])
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
SUBGRAPHS = sorted((ROOT / "subgraphs").glob("*.json"))
WRITTEN = runpy.run_path(str(ROOT / "docs" / "write_locale.py"))
BLUEPRINTS = runpy.run_path(str(ROOT / "docs" / "write_blueprints.py"))
expanded = BLUEPRINTS["expanded"]
SCHEMAS = {s.node_id: s for s in map(comfy_api_fixture.schema_of, comfy_api_fixture.all_nodes())}
STOCK = {
    *("BasicGuider", "CFGGuider", "CLIPLoader", "CLIPTextEncode", "CheckpointLoaderSimple"),
    *("DualCLIPLoader", "EmptyFlux2LatentImage", "EmptyLatentImage", "EmptySD3LatentImage"),
    *("Flux2Scheduler", "FluxGuidance", "ImageBatch", "MarkdownNote"),
    *("PreviewAny", "PreviewImage", "PrimitiveInt", "PrimitiveStringMultiline"),
    "SamplerCustomAdvanced",
    *("SaveImage", "UNETLoader", "VAEDecode", "VAELoader"),
}
FAMILIES = ("FLUX.1", "FLUX.2 klein", "SD 1.5", "SD 3.5", "SDXL", "Z-Image")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def flat(inputs: list[Any], chosen: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Inputs by name, those that a choice has brought among them, as the frontend names them."""
    for given in inputs:
        name = before + given.id
        yield name, given
        if given.io_type == "COMFY_DYNAMICCOMBO_V3":
            (option,) = (o for o in given.options if o.key == chosen[name])
            yield from flat(option.inputs, chosen, f"{name}.")


def path_of(widget: str) -> str:
    """The config's name of a widget of PCPO Training Settings."""
    return widget.replace("_", ".", 1)


def test_there_is_a_workflow_of_each_kind():
    names = {file.stem for file in WORKFLOWS}
    demo = {name for name in names if name[0].isdigit()}
    assert [name[:3] for name in sorted(demo)] == [f"{i:02} " for i in range(1, 12)]
    of = {family: {n for n in names if n.startswith(f"{family} - ")} for family in FAMILIES}
    assert set().union(demo, *of.values()) == names
    for family, theirs in of.items():  # listed in this order, which begins with what is easiest
        kinds = [name.removeprefix(f"{family} - ") for name in sorted(theirs)]
        assert [kind[:2] for kind in kinds] == [f"{i} " for i in range(1, len(kinds) + 1)]
        assert [kind[2:] for kind in kinds[:2]] == ["Sample and score", "Train a LoRA"]
        assert kinds[-1][2:] == "Mix two rewards"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_a_workflow_has_few_boxes_and_a_name_for_every_system(file):
    assert len(read(file)["nodes"]) <= 12
    assert not set('<>:"/\\|?*%#&+') & set(file.stem)  # the browser asks for it by its name


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_workflow_is_whole(file):
    graph = expanded(read(file))
    nodes = {node["id"]: node for node in graph["nodes"]}
    types = {node["type"] for node in nodes.values()}
    assert types - STOCK <= SCHEMAS.keys() and types & SCHEMAS.keys()
    assert "MarkdownNote" in types
    seen = set()
    for link, source, output, target, slot, kind in graph["links"]:
        giver = nodes[source]["outputs"][output]
        taker = nodes[target]["inputs"][slot]
        assert link in giver["links"] and taker["link"] == link
        assert kind in (giver["type"], "*") and taker["type"] in (giver["type"], "*")
        seen.add(link)
    wired = {i["link"] for n in nodes.values() for i in n.get("inputs", []) if i.get("link")}
    assert wired == seen
    for node in nodes.values():
        for wanted in node.get("inputs", []):
            is_needed = "widget" not in wanted and wanted.get("shape") != 7  # 7: optional
            if is_needed and not wanted["name"].startswith(("tuned.", "rewards.")):
                assert wanted.get("link"), (node["type"], wanted["name"])


@pytest.mark.parametrize("file", WORKFLOWS + SUBGRAPHS, ids=lambda f: f.stem)
def test_widgets_are_the_schemas(file):
    for node in expanded(read(file))["nodes"]:
        schema = SCHEMAS.get(node["type"])
        if schema is None:
            continue
        widgets = [i["name"] for i in node["inputs"] if "widget" in i]
        chosen = node.get("widgets_values", [])
        values = dict(zip(widgets, chosen, strict=False))
        known = dict(flat(schema.inputs, values))
        kinds = {name: given.io_type.partition(",")[0] for name, given in known.items()}
        assert [name for name, kind in kinds.items() if kind in WIDGETS] == widgets
        extra = sum(bool(getattr(i, "control_after_generate", None)) for i in schema.inputs)
        assert len(chosen) == len(widgets) + extra
        for name, given in known.items():
            if given.io_type == "COMBO" and given.options and name in values:
                assert values[name] in [*given.options, "jpeg_incompressibility"], name
            elif getattr(given, "min", None) is not None and name in values:
                assert given.min <= values[name] <= given.max, name
        assert "randomize" not in chosen


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_a_graph_that_trains_does_so_by_its_preset_and_says_what_is_muted(file):
    nodes = expanded(read(file))["nodes"]
    types = [node["type"] for node in nodes]
    for node in nodes:
        if node["type"] == "PCPOTrainingSettings":
            (preset,) = SCHEMAS[node["type"]].inputs
            (option,) = (o for o in preset.options if o.key == node["widgets_values"][0])
            assert node["widgets_values"][1:] == [i.default for i in option.inputs]
    muted = {node["type"] for node in nodes if node["mode"]}
    if "PCPOTrainInBackground" in types and "PCPOWaitForJob" not in types:
        assert "PCPOLoadJobLora" in muted  # the job has no LoRA when the graph is first run
        trains = {"PCPOTrainInBackground", "PCPOTrainingSettings"}
        # nor is there a vote
        assert muted & trains == (trains if "PCPORateImages" in types else set())
        (note,) = (n["widgets_values"][0] for n in nodes if n["type"] == "MarkdownNote")
        assert "Set Group Nodes to Always" in note
    else:
        assert not muted


TITLE = 30
"""Height of a node's title, which is above its position."""


def box(node: dict) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_no_node_is_on_another_and_wires_lead_to_the_right(file):
    graph = read(file)
    boxes = {node["id"]: box(node) for node in graph["nodes"]}
    for (a, one), (b, other) in itertools.combinations(boxes.items(), 2):
        is_apart = one[2] <= other[0] or other[2] <= one[0]
        assert is_apart or one[3] <= other[1] or other[3] <= one[1], (a, b)
    for _, source, _, target, *_ in graph["links"]:
        assert boxes[source][2] <= boxes[target][0], (source, target)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
@pytest.mark.parametrize(("width", "height"), [(1600, 950), (1366, 768)])
def test_it_opens_with_note_and_first_group_in_sight(file, width, height):
    graph = read(file)
    view, first = graph["extra"]["ds"], min(graph["groups"], key=lambda g: g["bounding"][0])
    (note,) = (box(node) for node in graph["nodes"] if node["type"] == "MarkdownNote")
    inside = [box(n) for n in graph["nodes"] if contains(first["bounding"], box(n))]
    assert view["pcpo"] and view["scale"] >= 0.7 and len(inside) >= 4
    for left, top, right, bottom in (note, *inside):
        assert (left + view["offset"][0]) * view["scale"] >= 60  # beside the side bar
        assert (top + view["offset"][1]) * view["scale"] >= 90  # below the tabs and the menu
        assert (right + view["offset"][0]) * view["scale"] <= width
        assert (bottom + view["offset"][1]) * view["scale"] <= height


def contains(bounding: list[float], inner: tuple[float, ...]) -> bool:
    x, y, width, height = bounding
    return x <= inner[0] and y <= inner[1] and inner[2] <= x + width and inner[3] <= y + height


def test_blueprints_are_what_their_script_writes():
    # where this fails: uv run --extra test python docs/write_blueprints.py
    written = {
        each.name: BLUEPRINTS["text_of"](each.graph()) for each in BLUEPRINTS["blueprints"]()
    }
    assert written == {file.stem: file.read_text(encoding="utf-8") for file in SUBGRAPHS}
    assert sorted(written) == [
        *("Align my model", "Best of 16", "Is my LoRA better", "Two rewards, one slider"),
    ]


@pytest.mark.parametrize("file", SUBGRAPHS, ids=lambda f: f.stem)
def test_a_blueprint_is_one_box_with_all_that_its_nodes_need(file):
    graph = read(file)
    (box,) = graph["nodes"]
    (kind,) = BLUEPRINTS["subgraphs"](graph).values()
    assert box["type"] == kind["id"] and box["title"] == kind["name"] == file.stem
    assert [i["name"] for i in box["inputs"] if "widget" not in i] == ["model", "clip", "vae"]
    labels = [i["label"] for i in box["inputs"] if "widget" in i]
    assert len(labels) >= 5 and box["outputs"] and kind["description"].endswith(".")
    for node in kind["nodes"]:
        for given in node["inputs"]:
            is_needed = "widget" not in given and given.get("shape") != 7  # 7: optional
            if is_needed and given["name"] not in {"tuned.tuned_2"}:
                assert given["link"], (node["type"], given["name"])
    shown = {(node, widget) for node, widget in box["properties"]["proxyWidgets"]}
    there = {(str(n["id"]), i["name"]) for n in kind["nodes"] for i in n["inputs"] if "widget" in i}
    assert shown <= there and len(shown) == len(labels)


@pytest.mark.parametrize("file", WORKFLOWS + SUBGRAPHS, ids=lambda f: f.stem)
def test_a_box_s_links_are_those_of_its_nodes(file):
    graph = read(file)
    ids = [
        n["id"] for each in (graph, *BLUEPRINTS["subgraphs"](graph).values()) for n in each["nodes"]
    ]
    assert len(ids) == len({*ids})  # ComfyUI would number them anew
    for kind in BLUEPRINTS["subgraphs"](graph).values():
        assert graph["floatingLinks"] == []  # the newest frontend reads it where there is a box
        nodes = {node["id"]: node for node in kind["nodes"]}
        for link in kind["links"]:
            start, target, number = link["origin_id"], link["target_id"], link["id"]
            if start == BLUEPRINTS["INPUTS"]:
                assert number in kind["inputs"][link["origin_slot"]]["linkIds"]
            else:
                assert number in nodes[start]["outputs"][link["origin_slot"]]["links"]
            if target == BLUEPRINTS["OUTPUTS"]:
                assert number in kind["outputs"][link["target_slot"]]["linkIds"]
            else:
                assert nodes[target]["inputs"][link["target_slot"]]["link"] == number


NETWORKS = {
    (file, node["widgets_values"][0])
    for file in WORKFLOWS
    for node in expanded(read(file))["nodes"]
    if node["type"] == "PCPOReward" and of_reward(node["widgets_values"][0])
}


def test_the_demo_s_rewards_need_no_files():
    assert not [file.stem for file, _ in NETWORKS if file.stem[0].isdigit()]
    assert {reward for _, reward in NETWORKS} == {"aesthetic", "pick_score", "hps_v2_1"}


@pytest.mark.parametrize(("file", "reward"), sorted(NETWORKS), ids=str)
def test_the_note_says_which_file_goes_where(file, reward):
    (note,) = (n for n in read(file)["nodes"] if n["type"] == "MarkdownNote")
    text = note["widgets_values"][0]
    assert f"`python trainers rewards get {reward}`" in text
    for needed in of_reward(reward):
        (line,) = (line for line in text.splitlines() if Path(needed.name).name in line)
        assert f"models/{needed.folder}" in line
        assert needed.licence.split()[0] in line


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda f: f.stem)
def test_nothing_of_a_machine_is_in_it(file):
    graph = read(file)
    for node in BLUEPRINTS["all_nodes"](graph):
        for model in node["properties"].pop("models", []):  # what ComfyUI offers to fetch
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}") and model["directory"]
    text = json.dumps(graph)
    assert "/tmp" not in text and "C:\\" not in text and "http" not in text
    with Image.open(file.with_suffix(".jpg")) as thumbnail:
        assert max(thumbnail.size) <= 640 and thumbnail.format == "JPEG"


@pytest.mark.parametrize("name", SCHEMAS)
def test_help_page_and_locale_say_what_the_schema_says(name):
    schema = SCHEMAS[name]
    page = (ROOT / "nodes" / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    texts = read(ROOT / "locales" / "en" / "nodeDefs.json")[name]
    assert page.startswith(f"# {schema.display_name}\n")
    assert texts["display_name"] == schema.display_name
    assert texts["description"] == schema.description
    # where this fails: uv run --extra test python docs/write_locale.py
    assert WRITTEN["updated"](texts, schema) == texts
    for given in schema.inputs:
        assert f"`{given.id}`" in page
        assert (given.tooltip or "") in page
        if given.io_type == "COMFY_DYNAMICCOMBO_V3":
            for widget in given.nested()[1:]:
                assert f"`{widget.id}`" in page
                assert widget.tooltip.removesuffix(f" Config field: {path_of(widget.id)}.") in page
    for place, output in enumerate(schema.outputs):
        assert texts["outputs"][str(place)]["tooltip"] == output.tooltip
        assert f"`{output.display_name}`" in page


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_input_is_called_by_its_key(name):
    inputs = read(ROOT / "locales" / "en" / "nodeDefs.json")[name]["inputs"]
    names = [text["name"] for text in inputs.values()]
    assert not [name for name in names if "_" in name]
    settings = [text for key, text in inputs.items() if key.startswith("preset_")]
    assert all(text["name"][0].isupper() and text["tooltip"] for text in settings)
    assert len({text["name"] for text in settings}) == len(settings)


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_number_stands_for_a_choice(name):
    for text in read(ROOT / "locales" / "en" / "nodeDefs.json")[name]["inputs"].values():
        assert not re.search(r"-1: |\b0: the w|0 leaves it unset|if not set", text["tooltip"]), text
    for given in (nested for outer in SCHEMAS[name].inputs for nested in outer.nested()):
        if given.io_type in ("INT", "FLOAT"):
            assert given.default is None or given.default >= 0, given.id


def test_no_help_without_a_node():
    pages = {file.stem for file in (ROOT / "nodes" / "web" / "docs").glob("*.md")}
    assert pages == SCHEMAS.keys() == read(ROOT / "locales" / "en" / "nodeDefs.json").keys()
