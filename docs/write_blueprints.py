"""Fold nodes of a workflow into one box (a subgraph), and write the blueprints in `subgraphs/`.

    uv run --extra test python docs/write_blueprints.py

A blueprint is a subgraph that ComfyUI lists in its node library. Each is made of a template's
nodes, with the values that they have there.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKFLOWS, BLUEPRINTS = ROOT / "workflows", ROOT / "subgraphs"
Graph = dict[str, Any]
INPUTS, OUTPUTS = -10, -20
"""What the links inside a subgraph call its two ends."""
ROW, HEAD = 20, 40
ORDER = {"MODEL": 0, "CLIP": 1, "VAE": 2}
"""Sockets that come first on a box."""


def subgraphs(graph: Graph) -> dict[str, Graph]:
    """The subgraphs of a workflow by id, which is the type of the nodes that stand for them."""
    return {each["id"]: each for each in (graph.get("definitions") or {}).get("subgraphs", ())}


def all_nodes(graph: Graph) -> Iterator[dict[str, Any]]:
    """The nodes of a workflow and of its subgraphs, without the boxes that stand for these."""
    for each in (graph, *subgraphs(graph).values()):
        yield from (node for node in each["nodes"] if node["type"] not in subgraphs(graph))


def expanded(graph: Graph) -> Graph:
    """A workflow without subgraphs; ids of what was inside are as ComfyUI's queue names them.

    A box that is muted mutes what is inside.
    """
    kinds = subgraphs(graph)
    boxes = {node["id"]: node for node in graph["nodes"] if node["type"] in kinds}
    nodes = [copy.deepcopy(n) for n in graph["nodes"] if n["id"] not in boxes]
    links: list[list[Any]] = []
    for id, box in boxes.items():
        for node in copy.deepcopy(kinds[box["type"]]["nodes"]):
            nodes.append({**node, "id": f"{id}:{node['id']}", "mode": box["mode"] or node["mode"]})

    def source(id: Any, slot: int) -> tuple[Any, int]:
        if id not in boxes:
            return id, slot
        (inner,) = (
            link
            for link in kinds[boxes[id]["type"]]["links"]
            if link["target_id"] == OUTPUTS and link["target_slot"] == slot
        )
        return f"{id}:{inner['origin_id']}", inner["origin_slot"]

    for _, *start, target, slot, kind in graph["links"]:
        if target not in boxes:
            links.append([*source(*start), target, slot, kind])
    for id, box in boxes.items():
        given = {link[4]: link for link in graph["links"] if link[3] == id}
        for link in kinds[box["type"]]["links"]:
            if link["target_id"] == OUTPUTS:
                continue
            start = (f"{id}:{link['origin_id']}", link["origin_slot"])
            if link["origin_id"] == INPUTS:
                if link["origin_slot"] not in given:  # a widget that is shown on the box
                    continue
                start = source(*given[link["origin_slot"]][1:3])
            links.append([*start, f"{id}:{link['target_id']}", link["target_slot"], link["type"]])
    return wired({**graph, "definitions": None}, nodes, links)


def wired(graph: Graph, nodes: list[Any], links: Iterable[list[Any]]) -> Graph:
    """A workflow of nodes and of links without their numbers."""
    for node in nodes:
        for given in node.get("inputs", ()):
            given["link"] = None
        for output in node.get("outputs", ()):
            output["links"] = None
    known = {node["id"]: node for node in nodes}
    numbered = [[i, *link] for i, link in enumerate(links, 1)]
    for number, start, output, target, slot, _ in numbered:
        giver = known[start]["outputs"][output]
        giver["links"] = [*(giver["links"] or ()), number]
        known[target]["inputs"][slot]["link"] = number
    return {**graph, "nodes": nodes, "links": numbered, "last_link_id": len(numbered)}


@dataclass(frozen=True)
class Box:
    """A box to fold nodes into.

    Args:
        name: its title.
        about: what it does, in one sentence.
        nodes: ids of the nodes to fold.
        shown: widgets on the box, as (node, widget, name on the box).
        place: position and size of the box.
        names: of sockets, where they are not the name of what they lead to.
    """

    name: str
    about: str
    nodes: tuple[Any, ...]
    shown: tuple[tuple[Any, str, str], ...] = ()
    place: tuple[float, float, float, float] = (0, 0, 320, 300)
    names: Mapping[str, str] = field(default_factory=dict)


def folded(graph: Graph, box: Box, id: int | None = None) -> Graph:
    """A workflow in which a box stands for some nodes."""
    number = id or max(n["id"] for n in graph["nodes"] if isinstance(n["id"], int)) + 1
    whole = range(number + 1, number + 1 + len(box.nodes))  # ids that nothing else has
    new = dict(zip(box.nodes, whole, strict=True))
    found = {node["id"]: node for node in graph["nodes"]}
    inside = {i: {**copy.deepcopy(found[old]), "id": i} for old, i in new.items()}
    inner: list[dict[str, Any]] = []
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    outer: list[list[Any]] = []
    sources: dict[tuple[Any, int], int] = {}
    sinks: dict[tuple[Any, int], int] = {}

    def add(start: int, slot: int, target: int, into: int, kind: str) -> int:
        link = {"id": len(inner) + 1, "origin_id": start, "origin_slot": slot}
        inner.append(link | {"target_id": target, "target_slot": into, "type": kind})
        return len(inner)

    def socket(name: str, kind: str, taken: list[dict[str, Any]]) -> dict[str, Any]:
        given = box.names.get(name, name)
        unique = uuid.uuid5(uuid.NAMESPACE_URL, f"{box.name}/{len(taken)}/{given}")
        return {"id": str(unique), "name": given, "type": kind, "linkIds": []}

    ordered = sorted(graph["links"], key=lambda link: ORDER.get(link[5], len(ORDER)))
    for _, start, slot, target, into, kind in ordered:
        if start in new and target in new:
            add(new[start], slot, new[target], into, kind)
        elif target in new:
            if (start, slot) not in sources:
                sources[start, slot] = len(inputs)
                wanted = inside[new[target]]["inputs"][into]
                inputs.append(socket(wanted["name"].rpartition(".")[2], kind, inputs))
                outer.append([start, slot, number, len(inputs) - 1, kind])
            place = sources[start, slot]
            inputs[place]["linkIds"].append(add(INPUTS, place, new[target], into, kind))
        elif start in new:
            if (start, slot) not in sinks:
                sinks[start, slot] = len(outputs)
                outputs.append(socket(inside[new[start]]["outputs"][slot]["name"], kind, outputs))
                outputs[-1]["linkIds"].append(
                    add(new[start], slot, OUTPUTS, len(outputs) - 1, kind)
                )
            outer.append([number, sinks[start, slot], target, into, kind])
        else:
            outer.append([start, slot, target, into, kind])
    sockets = len(inputs)
    for place, (node, widget, label) in enumerate(box.shown, sockets):
        places = inside[new[node]]["inputs"]
        (into,) = (i for i, given in enumerate(places) if given["name"] == widget)
        kind = places[into]["type"]
        inputs.append(socket(label.replace(" ", "_"), kind, inputs) | {"label": label})
        inputs[-1]["linkIds"].append(add(INPUTS, place, new[node], into, kind))
    kind = definition(box, list(inside.values()), inner, inputs, outputs)
    x, y, width, height = box.place
    slots = [{**{k: i[k] for k in ("name", "type")}, "link": None} for i in inputs]
    for slot, given in zip(slots[sockets:], inputs[sockets:], strict=True):
        slot |= {"label": given["label"], "widget": {"name": slot["name"]}}
    stands = {
        **{"id": number, "type": kind["id"], "title": box.name, "pos": [x, y]},
        **{"size": [width, height], "flags": {}, "order": 0},
        "mode": max(node["mode"] for node in inside.values()),
        "inputs": slots,
        "outputs": [{**{k: o[k] for k in ("name", "type")}, "links": None} for o in outputs],
        "properties": {"proxyWidgets": [[str(new[n]), w] for n, w, _ in box.shown]},
        "widgets_values": [],
    }
    for node in inside.values():
        node["mode"] = 0
    kept = [copy.deepcopy(n) for n in graph["nodes"] if n["id"] not in new]
    made = wired(graph, [*kept, stands], outer)
    made["floatingLinks"] = []
    made["definitions"] = {"subgraphs": [*subgraphs(graph).values(), kind]}
    return {**made, "last_node_id": max(whole)}


def definition(
    box: Box, nodes: list[Any], links: list[Any], inputs: list[Any], outputs: list[Any]
) -> Graph:
    """A subgraph as a workflow holds it."""
    for node in nodes:
        for given in node.get("inputs", ()):
            given["link"] = None
        for output in node.get("outputs", ()):
            output["links"] = None
    known = {node["id"]: node for node in nodes}
    for link in links:
        if link["origin_id"] != INPUTS:
            giver = known[link["origin_id"]]["outputs"][link["origin_slot"]]
            giver["links"] = [*(giver["links"] or ()), link["id"]]
        if link["target_id"] != OUTPUTS:
            known[link["target_id"]]["inputs"][link["target_slot"]]["link"] = link["id"]
    left = min(node["pos"][0] for node in nodes)
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    top = min(node["pos"][1] for node in nodes)
    shape = json.dumps([box.name, nodes, links], sort_keys=True)
    last = {"lastGroupId": 0, "lastNodeId": max(known), "lastLinkId": len(links)}
    sides = {
        "inputNode": {"id": INPUTS, "bounding": [left - 220, top, 140, HEAD + ROW * len(inputs)]},
        "outputNode": {
            "id": OUTPUTS,
            "bounding": [right + 80, top, 120, HEAD + ROW * len(outputs)],
        },
    }
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, shape)),
        **{"version": 1, "state": {**last, "lastRerouteId": 0}, "revision": 0, "config": {}},
        **{"name": box.name, **sides, "inputs": inputs, "outputs": outputs, "widgets": []},
        **{"nodes": nodes, "groups": [], "links": links, "extra": {}},
        **{"category": "PCPO", "description": box.about},
    }
