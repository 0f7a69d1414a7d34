"""ComfyUI-PCPO: alignment of image models by reinforcement learning.

ComfyUI loads this folder by its path and calls `comfy_entrypoint`; nothing is imported before that.
"""

from typing import Any

WEB_DIRECTORY = "./nodes/web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """The pack's nodes, as ComfyUI's V3 loader asks for them."""
    from .nodes.extension import PcpoExtension

    return PcpoExtension()
