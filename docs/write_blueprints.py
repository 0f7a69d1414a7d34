"""Fold nodes of a workflow into one box (a subgraph), and write the blueprints in `subgraphs/`.

    uv run --extra test python docs/write_blueprints.py

A blueprint is a subgraph that ComfyUI lists in its node library. Each is made of a template's
nodes, with the values that they have there.
"""

from __future__ import annotations

import copy
import json
import sys
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


def folded(graph: Graph, box: Box) -> Graph:
    """A workflow in which a box stands for some nodes."""
    number = graph["last_node_id"] + 1
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


# --- blueprints ----------------------------------------------------------------------------------


def from_template(template: str, kind: str, title: str = "", **values: Any) -> dict[str, Any]:
    """A node as a template has it.

    Args:
        template: its name.
        kind: the node's type.
        title: of the node, where several are of a kind.
        values: of its widgets.
    """
    graph = json.loads((WORKFLOWS / f"{template}.json").read_text("utf-8"))
    nodes = (n for n in expanded(graph)["nodes"] if n["type"] == kind)
    node = next(n for n in nodes if title in n.get("title", ""))
    widgets = [given["name"] for given in node["inputs"] if "widget" in given]
    for name, value in values.items():
        node["widgets_values"][widgets.index(name)] = value
    return {**node, "mode": 0}


def from_schema(id: str, **values: Any) -> dict[str, Any]:
    """A node of this pack with its defaults."""
    sys.path.insert(0, str(ROOT / "tests" / "fixtures"))
    import comfy_api_fixture  # ComfyUI's own classes are on no package index

    nodes = map(comfy_api_fixture.schema_of, comfy_api_fixture.all_nodes())
    schema = next(each for each in nodes if each.node_id == id)
    widgets = {i.id: values.get(i.id, i.default) for i in schema.inputs if i.io_type in WIDGETS}
    inputs = [(given.id, given.io_type, given.optional) for given in schema.inputs]
    outputs = [(output.display_name, output.io_type) for output in schema.outputs]
    return made(id, (280, 320), inputs, outputs, widgets)


def made(
    kind: str,
    size: tuple[int, int],
    inputs: Iterable[tuple[str, str, bool]],
    outputs: Iterable[tuple[str, str]],
    widgets: Mapping[str, Any],
) -> dict[str, Any]:
    """A node of sockets (name, type, whether it is optional) and widgets' values."""
    sockets = [
        {"name": name, "type": type_, "link": None}
        | ({"shape": 7} if optional else {})
        | ({"widget": {"name": name}} if name in widgets else {})
        for name, type_, optional in inputs
    ]
    return {
        **{"type": kind, "size": list(size), "flags": {}, "order": 0, "mode": 0},
        "inputs": sorted(sockets, key=lambda socket: "widget" in socket),
        "outputs": [{"name": name, "type": type_, "links": None} for name, type_ in outputs],
        **{"properties": {"Node name for S&R": kind}, "widgets_values": list(widgets.values())},
    }


WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SOURCE, SINK = "in", "out"
"""What the wires of a blueprint call its own sockets."""


@dataclass(frozen=True)
class Blueprint:
    """A blueprint.

    Args:
        name: of its file and its box.
        about: what it does, in one sentence.
        nodes: by a name that the wires use.
        wires: "node.output > node.input", separated by lines.
        shown: "node.widget" to its name on the box.
        size: of the box.
    """

    name: str
    about: str
    nodes: Mapping[str, dict[str, Any]]
    wires: str
    shown: Mapping[str, str]
    size: tuple[int, int]

    def graph(self) -> Graph:
        """The box alone, as a workflow."""
        ids = {name: i for i, name in enumerate((*self.nodes, SOURCE, SINK), 1)}
        wires = [each.strip().split(" > ") for each in self.wires.strip().splitlines()]
        kinds = {"model": "MODEL", "clip": "CLIP", "vae": "VAE"}
        source = made("source", (0, 0), (), kinds.items(), {})
        sinks = [end.partition(".")[2] for _, end in wires if end.startswith(f"{SINK}.")]
        sink = made("sink", (0, 0), [(name, "*", False) for name in sinks], (), {})
        nodes = copy.deepcopy({**self.nodes, SOURCE: source, SINK: sink})
        for name, node in nodes.items():
            node["id"] = ids[name]
        links = []
        for start, end in wires:
            (giver, output), (taker, into) = (e.split(".", 1) for e in (start, end))
            slot = next(i for i, o in enumerate(nodes[giver]["outputs"]) if o["name"] == output)
            place = next(i for i, o in enumerate(nodes[taker]["inputs"]) if o["name"] == into)
            kind = nodes[giver]["outputs"][slot]["type"]
            links.append([ids[giver], slot, ids[taker], place, kind])
        place_columns(list(nodes.values()), links)
        graph = wired({"last_node_id": len(ids)}, list(nodes.values()), links)
        shown = [(*key.split(".", 1), label) for key, label in self.shown.items()]
        box = Box(
            self.name,
            self.about,
            tuple(ids[name] for name in self.nodes),
            shown=tuple((ids[node], widget, label) for node, widget, label in shown),
            place=(0, 0, *self.size),
            names={"base": "model", "model_a": "model", "IMAGE": "images"},
        )
        folded_ = folded(graph, box)
        (only,) = (n for n in folded_["nodes"] if n["id"] not in ids.values())
        alone = wired(folded_, [only], [])
        order = ("last_node_id", "last_link_id", "nodes", "links", "floatingLinks", "definitions")
        return {"revision": 0, **{k: alone[k] for k in order}, "version": 0.4, "extra": {}}


def place_columns(nodes: list[Any], links: list[list[Any]]) -> None:
    """Place nodes from left to right as their links lead."""
    depth = {node["id"]: 0 for node in nodes}
    for _ in nodes:
        for start, _, target, *_ in links:
            depth[target] = max(depth[target], depth[start] + 1)
    heights: dict[int, float] = {}
    for node in nodes:
        column = depth[node["id"]]
        node["pos"] = [400 * column, heights.get(column, 60)]
        heights[column] = node["pos"][1] + node["size"][1] + 60


FIRST, BEST = "SDXL - 1 Sample and score", "02 Best four of sixteen"
MIX, BETTER = "SDXL - 3 Mix two rewards", "07 Is my LoRA better"
THEN = "10 Train then less or more"
CONDITIONS = """
    in.clip > positive.clip
    prompt.STRING > positive.text
    in.clip > negative.clip
"""
DRAWS = """
    in.model > steps.model
    noise.noise > sample.noise
    sampler.sampler > sample.sampler
    steps.sigmas > sample.sigmas
    size.LATENT > sample.latent_image
    sample.output > decode.samples
    in.vae > decode.vae
"""


def drawing(**of_size: Any) -> dict[str, dict[str, Any]]:
    """The nodes that draw, without a guider."""
    kinds = {
        **{"prompt": "PrimitiveStringMultiline", "steps": "PCPOScheduler"},
        **{"sampler": "PCPOSdeSampler", "noise": "PCPONoise"},
        **{"sample": "SamplerCustomAdvanced", "decode": "VAEDecode"},
    }
    nodes = {name: from_template(FIRST, kind) for name, kind in kinds.items()}
    nodes["positive"], nodes["negative"] = (
        from_template(FIRST, "CLIPTextEncode", title) for title in ("", "Negative")
    )
    return nodes | {"size": from_template(FIRST, "EmptyLatentImage", **of_size)}


WORDS = {"prompt.value": "prompt", "negative.text": "negative prompt", "guider.cfg": "cfg"}
SIZE = {"size.width": "width", "size.height": "height", "size.batch_size": "images"}
STEPS = {"steps.steps": "steps", "noise.seed": "seed"}
GUIDED = """
    positive.CONDITIONING > guider.positive
    negative.CONDITIONING > guider.negative
"""


def align_my_model() -> Blueprint:
    """Train, wait, load."""
    return Blueprint(
        "Align my model",
        "Trains a LoRA with which your model scores higher on a reward, waits for it, and "
        "gives the model with it. Queued again unchanged, it trains nothing again.",
        {
            "train": from_schema("PCPOTrainEasy", reward="jpeg_incompressibility"),
            "wait": from_template(THEN, "PCPOWaitForJob"),
            "lora": from_template(THEN, "PCPOLoadJobLora"),
        },
        """
        in.model > train.model
        in.clip > train.clip
        in.vae > train.vae
        train.job > wait.job
        wait.job > lora.from_job
        in.model > lora.model
        in.clip > lora.clip
        lora.model > out.model
        lora.clip > out.clip
        """,
        {
            "train.reward": "reward",
            "train.prompts": "prompts",
            "train.name": "name",
            "train.how_long": "how long",
            "lora.strength": "strength",
        },
        (320, 360),
    )


def best_of_16() -> Blueprint:
    """Draw, score, keep."""
    return Blueprint(
        "Best of 16",
        "Draws sixteen images of a prompt and gives the one that scores highest, or more.",
        {
            **drawing(batch_size=16),
            "guider": from_template(FIRST, "CFGGuider"),
            "reward": from_template(FIRST, "PCPOReward"),
            "best": from_template(BEST, "PCPOBestOfN", n=1),
        },
        f"""
        {CONDITIONS.strip()}
        in.model > guider.model
        {GUIDED.strip()}
        guider.GUIDER > sample.guider
        {DRAWS.strip()}
        decode.IMAGE > best.images
        reward.reward > best.reward
        sample.output > best.latent
        prompt.STRING > best.prompt
        best.images > out.images
        best.latent > out.latent
        best.scores > out.scores
        """,
        {**WORDS, **SIZE, "best.n": "keep", "reward.reward": "reward", **STEPS},
        (340, 620),
    )


def two_rewards() -> Blueprint:
    """Two LoRAs and a number between them."""
    number = made(
        "PrimitiveFloat",
        (250, 90),
        [("value", "FLOAT", False)],
        [("FLOAT", "FLOAT")],
        {"value": 0.5},
    )
    rest = made(
        "ComfyMathExpression",
        (250, 160),
        [("values.a", "FLOAT,INT,BOOLEAN", False), ("expression", "STRING", False)],
        [("FLOAT", "FLOAT"), ("INT", "INT"), ("BOOL", "BOOLEAN")],
        {"expression": "1 - a"},
    )
    return Blueprint(
        "Two rewards, one slider",
        "Draws with two LoRAs at once, each trained on a reward: at 0 with the first alone, at 1 "
        "with the second alone, between them with both.",
        {
            **drawing(),
            "slider": number,
            "rest": rest,
            "first": from_template(MIX, "PCPOTunedLora", "First"),
            "second": from_template(MIX, "PCPOTunedLora", "Second"),
            "guider": from_template(MIX, "PCPOImplicitRewardGuider"),
        },
        f"""
        {CONDITIONS.strip()}
        slider.FLOAT > rest.values.a
        in.model > first.base
        in.model > second.base
        rest.FLOAT > first.gamma
        slider.FLOAT > second.gamma
        in.model > guider.base
        {GUIDED.strip()}
        first.tuned > guider.tuned.tuned_0
        second.tuned > guider.tuned.tuned_1
        guider.guider > sample.guider
        {DRAWS.strip()}
        decode.IMAGE > out.images
        """,
        {
            "slider.value": "first 0 to 1 second",
            "first.lora_name": "first LoRA",
            "second.lora_name": "second LoRA",
            **WORDS,
            **SIZE,
            **STEPS,
        },
        (340, 640),
    )


def is_it_better() -> Blueprint:
    """Base and LoRA, pair by pair."""
    return Blueprint(
        "Is my LoRA better",
        "Draws prompts with and without a LoRA from the same noise, scores both, and says which "
        "is better and how certain that is.",
        {
            "reward": from_template(FIRST, "PCPOReward"),
            "steps": from_template(FIRST, "PCPOScheduler"),
            "sampler": from_template(BETTER, "PCPOSdeSampler"),
            "compare": from_template(
                *(BETTER, "PCPOCompareModels"),
                prompts="a fox in the snow, photo\na lighthouse on a cliff, oil painting\n"
                "a bowl of strawberries on a wooden table\na castle in the fog, watercolour",
                cfg=5,
                width=1024,
                height=1024,
                images_per_prompt=4,
                batch=1,
            ),
        },
        """
        in.model > steps.model
        in.model > compare.model_a
        in.clip > compare.clip
        in.vae > compare.vae
        reward.reward > compare.reward
        sampler.sampler > compare.sampler
        steps.sigmas > compare.sigmas
        compare.grid > out.grid
        compare.table > out.table
        """,
        {
            "compare.lora_b": "LoRA",
            "reward.reward": "reward",
            "compare.prompts": "prompts",
            "compare.negative": "negative prompt",
            "compare.cfg": "cfg",
            "compare.width": "width",
            "compare.height": "height",
            "compare.images_per_prompt": "images per prompt",
            "steps.steps": "steps",
            "compare.seed": "seed",
        },
        (340, 560),
    )


def blueprints() -> list[Blueprint]:
    """All blueprints."""
    return [align_my_model(), best_of_16(), two_rewards(), is_it_better()]


def text_of(graph: Graph) -> str:
    """A file's text."""
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    BLUEPRINTS.mkdir(exist_ok=True)
    for blueprint in blueprints():
        file = BLUEPRINTS / f"{blueprint.name}.json"
        file.write_text(text_of(blueprint.graph()), "utf-8")
        print(f"written: {file.name}")
