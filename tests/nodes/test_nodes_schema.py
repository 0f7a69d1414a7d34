"""Every node's face: ids, names, tooltips; and that the pack's nodes are imported quickly."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import comfy_api_fixture
import comfyui_pcpo
import pytest
from comfy_api_fixture import all_nodes, schema_of

NODES = all_nodes()
SCHEMAS = {node.__name__: schema_of(node) for node in NODES}
HEAVY = {"accelerate", "diffusers", "matplotlib", "peft", "transformers"}
CREATED = {"PCPODemoModel", "PCPODemoLora", "PCPOSdeSampler", "PCPONoise", "PCPOScheduler"} | {
    "PCPOSampleTrajectory",
    "PCPOCreditWeights",
    "PCPOTrajectoryStrip",
}


def sentence(text: str | None) -> bool:
    return bool(text) and text[0].isprintable() and text.rstrip().endswith((".", "?", "!"))


def every_input(schema):
    return [nested for i in schema.inputs for nested in i.nested()]


def test_ids_are_the_packs_own_and_occur_once():
    ids = [schema.node_id for schema in SCHEMAS.values()]
    assert len(set(ids)) == len(ids) == len(NODES)
    assert all(re.fullmatch(r"PCPO[A-Z]\w+", name) for name in ids)
    assert set(ids) >= CREATED


def test_display_names_occur_once():
    names = [schema.display_name for schema in SCHEMAS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_node_says_what_it_is(name):
    schema = SCHEMAS[name]
    assert schema.display_name.startswith("PCPO ")
    assert re.fullmatch(r"PCPO/[a-z]+", schema.category)
    assert sentence(schema.description)
    assert schema.search_aliases


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_input_and_output_has_a_tooltip(name):
    schema = SCHEMAS[name]
    for i in every_input(schema):
        assert sentence(i.tooltip), f"{name}.{i.id}"
    for output in schema.outputs:
        assert sentence(output.tooltip), f"{name} gives {output.display_name}"
        assert output.display_name, f"{name}: an output without a name"


@pytest.mark.parametrize("name", SCHEMAS)
def test_defaults_are_among_what_is_offered(name):
    for i in every_input(SCHEMAS[name]):
        default = getattr(i, "default", None)
        if i.io_type == "COMBO":
            assert default is None or default in i.options, f"{name}.{i.id}"
        if i.io_type in {"INT", "FLOAT"}:
            assert i.min <= default <= i.max, f"{name}.{i.id}"


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_execute_takes_what_the_schema_has(node):
    schema = SCHEMAS[node.__name__]
    parameters = inspect.signature(node.execute).parameters
    assert [p for p in parameters if p not in {"kwargs"}] == [i.id for i in schema.inputs] or {
        i.id for i in schema.inputs
    } == set(parameters)
    optional = {i.id for i in schema.inputs if i.optional}
    assert all(parameters[p].default is not inspect.Parameter.empty for p in optional)


def test_the_pack_is_imported_without_what_is_slow():
    root = Path(comfyui_pcpo.__path__[0])
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import comfy_api_fixture\n"
        "import importlib.util as u\n"
        "spec = u.spec_from_file_location('some_pack', sys.argv[2] + '/__init__.py',"
        " submodule_search_locations=[sys.argv[2]])\n"
        "sys.modules['some_pack'] = m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "import asyncio; pack = asyncio.run(m.comfy_entrypoint())\n"
        "nodes = asyncio.run(pack.get_node_list()); [n.define_schema() for n in nodes]\n"
        "print(len(nodes), *sorted(n.split('.')[0] for n in sys.modules))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parents[1] / "fixtures"), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, *loaded = done.stdout.split()
    assert int(count) == len(NODES)
    assert not HEAVY & set(loaded)
    assert "comfyui_pcpo" not in loaded


def test_the_stand_in_refuses_what_comfyui_refuses():
    from comfy_api.latest import io

    with pytest.raises(TypeError, match="no keyword"):
        io.Int.Input("steps", minimum=1)
    twice = io.Schema("X", inputs=[io.Int.Input("a"), io.Float.Input("a")])
    with pytest.raises(AssertionError, match="twice"):
        twice.finalize()
    assert comfy_api_fixture.Input("a", "Name").display_name == "Name"
