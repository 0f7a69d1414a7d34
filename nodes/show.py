"""What a node shows while it runs."""

from __future__ import annotations

from collections.abc import Callable

from .jobs.access import is_shared


def progress(total: int) -> Callable[[int], None]:
    """ComfyUI's progress bar, and its button to interrupt."""
    import comfy.model_management
    import comfy.utils

    bar = comfy.utils.ProgressBar(total)

    def tick(done: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return tick


def show_text(text: str, node: str | None) -> None:
    """Write text on a node, where a server is there to do it."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is None or node is None:
        return
    client = server.client_id if is_shared() else None  # None: all that are connected
    if client is not None or not is_shared():
        shown = text.replace("\n", "  \n")  # Nodes 2.0 reads Markdown: a line ends with two spaces
        server.send_progress_text(shown, node, client)
