"""A widget's number that is not finite is refused by every node: a graph's JSON may hold NaN."""

from __future__ import annotations

import asyncio
import inspect

import comfy_api_fixture  # noqa: F401 (before any of the nodes)
import pytest
from comfyui_pcpo.nodes import extension
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.guidance import nodes as guidance
from comfyui_pcpo.nodes.sampling import nodes as sampling

NODES = {node.__name__: node for node in asyncio.run(extension.PcpoExtension().get_node_list())}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, -float("inf")]])
@pytest.mark.parametrize("name", NODES)
def test_every_node_refuses_it_before_it_works(name, value):
    execute = NODES[name].execute
    parameters = list(inspect.signature(execute).parameters)
    given = dict.fromkeys(parameters) | ({parameters[-1]: value} if parameters else {"x": value})
    with pytest.raises(NodeError, match=r"is (nan|inf|-inf); give a finite number"):
        execute(**given)


def test_the_list_may_be_asked_for_again():
    again = asyncio.run(extension.PcpoExtension().get_node_list())
    assert again == list(NODES.values()) and {guidance.PCPOTunedLora, sampling.NODES[0]} < set(
        again
    )
