"""ComfyUI-PCPO: alignment of image models by reinforcement learning.

ComfyUI loads this folder by its path and calls `comfy_entrypoint`; nothing is imported before that.
"""

import sys
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 (ComfyUI itself allows 3.10)
    raise ImportError(
        f"ComfyUI-PCPO needs Python 3.11 or newer, but runs on {sys.version.split()[0]}; "
        "start ComfyUI with a newer Python"
    )

WEB_DIRECTORY = "./nodes/web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> Any:
    """The pack's nodes, as ComfyUI's V3 loader asks for them."""
    from .nodes.extension import PcpoExtension

    return PcpoExtension()
