"""What was sent to ComfyUI's queue, so that a node can be checked by the nodes before it.

ComfyUI validates a graph before anything runs; a node then sees its own widgets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from .errors import NodeError

Graph = Mapping[str, Any]
"""Nodes by id, each with its class_type and inputs: ComfyUI's API format."""
Node = Mapping[str, Any]

_sent: ContextVar[Graph] = ContextVar("pcpo_graph", default={})  # noqa: B039 (never changed)
"""The graph that is being validated."""


def remember(sent: dict[str, Any]) -> dict[str, Any]:
    """Keep what is sent to ComfyUI's queue until it is validated."""
    graph = sent.get("prompt")
    _sent.set(graph if isinstance(graph, dict) else {})
    return sent


def sent_node(id: str | None) -> Node | None:
    """A node of the graph that is being validated."""
    return node_of(_sent.get(), id)


def sent_before(node: Node | None, name: str) -> Node | None:
    """The node that an input of a node is connected to, in the graph that is being validated."""
    return before(_sent.get(), node, name)


def node_of(graph: Graph, id: Any) -> Node | None:
    """A node, if it is one."""
    node = graph.get(str(id))
    is_node = isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping)
    return node if is_node else None


def before(graph: Graph, node: Node | None, name: str) -> Node | None:
    """The node that an input is connected to; None where it is not."""
    link = None if node is None else node["inputs"].get(name)
    return node_of(graph, link[0]) if is_link(link) else None


def is_link(value: Any) -> bool:
    """Whether an input's value is a connection."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def values_of(node: Node) -> dict[str, Any] | None:
    """A node's widgets by name; None where one of them is connected."""
    found = dict(node["inputs"])
    return None if any(map(is_link, found.values())) else found


def upstream(graph: Graph, id: str | None, names: tuple[str, ...]) -> list[Any] | None:
    """All that some inputs of a node come from, in an order that does not depend on ids.

    Returns:
        Class and inputs of each node, links as [place, output]; None where a node is not known.
    """
    places: dict[str, int] = {}
    found: list[Any] = []

    def visit(value: Any) -> Any:
        if not is_link(value):
            return value
        name = str(value[0])
        if name not in places:
            node = node_of(graph, name)
            if node is None:
                raise KeyError(name)
            places[name] = len(places)
            found.append(None)
            inputs = {key: visit(node["inputs"][key]) for key in sorted(node["inputs"])}
            found[places[name]] = [node.get("class_type"), inputs]
        return [places[name], value[1]]

    node = node_of(graph, id)
    if node is None:
        return None
    try:
        return [*(visit(node["inputs"].get(name)) for name in names), found]
    except (KeyError, RecursionError):
        return None


def verdict(check: Callable[[], Any]) -> bool | str:
    """What ComfyUI's validation wants to hear: True, or the sentence of a `NodeError`."""
    try:
        check()
    except NodeError as error:
        return str(error)
    return True
