"""What was sent to ComfyUI's queue, so that a node can be checked by the nodes before it.

ComfyUI validates a graph before anything runs; a node then sees its own widgets alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, TypeGuard

from .errors import NodeError
from .jobs.access import public_text, server

Graph = Mapping[str, Any]
"""Nodes by id, each with its class_type and inputs: ComfyUI's API format."""
Node = Mapping[str, Any]

SHOWING = ("PreviewImage", "SaveImage")
REFUSED = "pcpo.refused"
"""The message to the page that a node was refused."""

_sent: ContextVar[Mapping[str, Any]] = ContextVar("pcpo_sent")
"""What is being validated: a graph under "prompt", and the page under "client_id"."""


def remember(sent: dict[str, Any]) -> dict[str, Any]:
    """Keep what is sent to ComfyUI's queue until it is validated."""
    _sent.set(sent)
    return sent


def sent_graph() -> Graph:
    """The graph that is being validated; empty where there is none."""
    graph = _sent.get({}).get("prompt")
    return graph if isinstance(graph, dict) else {}


def node_of(graph: Graph, id: Any) -> Node | None:
    """A node, if it is one."""
    node = graph.get(str(id))
    if not isinstance(node, Mapping) or not isinstance(node.get("inputs"), Mapping):
        return None
    return node


def before(graph: Graph, node: Node | None, name: str) -> Node | None:
    """The node that an input is connected to; None where it is not."""
    link = None if node is None else node["inputs"].get(name)
    return node_of(graph, link[0]) if is_link(link) else None


def is_link(value: Any) -> TypeGuard[list[Any]]:
    """Whether an input's value is a connection."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], int)


def shows(graph: Graph, id: Any, output: int) -> bool:
    """Whether one of ComfyUI's own nodes shows an image that a node gives."""
    after = (node for key in graph if (node := node_of(graph, key)) is not None)
    return any(
        node.get("class_type") in SHOWING and [str(id), output] in node["inputs"].values()
        for node in after
    )


def values_of(node: Node, group: str = "") -> dict[str, Any] | None:
    """A node's widgets by name; None where one of them is connected.

    Args:
        group: a choice that brings widgets: it and they, by their names in it.
    """
    given = node["inputs"]
    found = {k.removeprefix(f"{group}."): v for k, v in given.items() if k.startswith(group)}
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


def verdict(cls: Any, check: Callable[[Node], Any]) -> bool | str:
    """What ComfyUI's validation wants to hear of a node: True, or the sentence of a `NodeError`.

    The page hears it too: ComfyUI says nothing aloud where another part of the graph can run.

    Args:
        cls: the node, which knows its id.
        check: raises for a node that cannot run.
    """
    node = node_of(sent_graph(), cls.hidden.unique_id)
    try:
        if node is not None:
            check(node)
    except NodeError as error:
        text, client, host = public_text(str(error)), _sent.get({}).get("client_id"), server()
        if host is not None and client is not None:
            kind = None if node is None else node.get("class_type")
            host.send_sync(REFUSED, {"node_type": kind, "text": text}, client)
        return text
    return True
