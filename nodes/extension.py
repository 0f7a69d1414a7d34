"""The list of the pack's nodes."""

from __future__ import annotations

from functools import wraps
from math import isfinite
from typing import Any

from comfy_api.latest import ComfyExtension, io

from .compare import nodes as compare
from .demo import nodes as demo
from .errors import NodeError
from .graph import remember
from .guidance import nodes as guidance
from .jobs import routes
from .jobs.access import server
from .rewards import nodes as rewards
from .rewards import routes as weight_routes
from .sampling import credit_plot
from .sampling import nodes as sampling
from .taste import nodes as taste
from .taste import routes as taste_routes
from .training import nodes as training

MODULES = (demo, sampling, credit_plot, rewards, taste, guidance, training, compare)


class PcpoExtension(ComfyExtension):
    """The pack, as ComfyUI loads it."""

    async def on_load(self) -> None:
        """Give the panel its routes."""
        routes.register()
        taste_routes.register()
        weight_routes.register()
        if (host := server()) is not None:
            host.add_on_prompt_handler(remember)  # after those that change it

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of the menu."""
        return [with_finite_numbers(node) for module in MODULES for node in module.NODES]


def with_finite_numbers(node: Any) -> Any:
    """A node that refuses numbers that are not finite: ComfyUI's ranges let NaN through."""
    plain = node.execute.__func__
    if hasattr(plain, "__wrapped__"):
        return node

    @wraps(plain)
    def execute(cls: Any, *given: Any, **inputs: Any) -> Any:
        for name, value in inputs.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, float) and not isfinite(number):
                    raise NodeError(f"{name} is {number}; give a finite number")
        return plain(cls, *given, **inputs)

    node.execute = classmethod(execute)
    return node
