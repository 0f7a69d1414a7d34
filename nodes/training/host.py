"""What training asks of ComfyUI: progress, memory, folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import NodeError
from ..show import progress, show_text

NONE = "none"
"""The choice of no file."""


def copy_progress(node: str | None) -> Callable[[int, int], None]:
    """Progress of a copy: told bytes written and bytes in all."""
    tick, shown = progress(100), -1

    def told(done: int, size: int) -> None:
        nonlocal shown
        percent = 100 * done // max(1, size)
        tick(percent)
        if percent != shown:
            shown = percent
            show_text(f"writing a copy of the model: {percent} % of {size / 1e9:.1f} GB", node)

    return told


def free_memory() -> None:
    """Take all models off the device; ComfyUI loads them again when it needs them."""
    from comfy.model_management import soft_empty_cache, unload_all_models

    unload_all_models()
    soft_empty_cache()


def block_output(reason: str | None) -> Any:
    """An output that blocks the nodes after it; the user sees the reason, if there is one."""
    from comfy_execution.graph_utils import ExecutionBlocker

    return ExecutionBlocker(reason)


# --- folders -------------------------------------------------------------------------------------


def models_folder(kind: str) -> Path:
    """Where ComfyUI looks for models of a kind first."""
    import folder_paths

    found = folder_paths.get_folder_paths(kind)
    if not found:
        raise NodeError(f"this ComfyUI has no folder for {kind}; create models/{kind}")
    return Path(found[0])


def output_folder() -> Path:
    """Where ComfyUI saves."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def lora_files() -> list[str]:
    """`NONE`, then the LoRAs that ComfyUI knows."""
    try:
        import folder_paths
    except ImportError:
        return [NONE]
    return [NONE, *folder_paths.get_filename_list("loras")]


def lora_path(file: str) -> Path | None:
    """The full path of a LoRA; None for `NONE`."""
    if file == NONE:
        return None
    import folder_paths

    path = folder_paths.get_full_path("loras", file)
    if path is None:
        raise NodeError(f"the LoRA {file!r} is not in models/loras any more; press R")
    return Path(path)
