"""The list of the pack's nodes."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import compare, demo, guidance, pictures, rewards, routes, sampling, training

MODULES = (demo, sampling, pictures, rewards, guidance, training, compare)


class PcpoExtension(ComfyExtension):
    """What ComfyUI is told of this pack."""

    async def on_load(self) -> None:
        """Give the panel its routes."""
        routes.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, in the order of the menu."""
        return [node for module in MODULES for node in module.NODES]
