"""The weights of rewards over HTTP, for the panel's page. Who may ask is decided as for jobs.

A client names an entry of the catalogue by its key, and neither an address nor a path.
"""

from __future__ import annotations

from collections.abc import Callable

from ..jobs import access
from ..jobs.handlers import Answer, changing, reading
from . import downloads

ACTIONS: dict[str, Callable[[str], None]] = {
    "download": downloads.download,
    "cancel": downloads.cancel,
}


def act(key: str, action: str) -> Answer:
    """Begin or end a download.

    Args:
        key: of the catalogue.
        action: one of `ACTIONS`.

    Returns:
        {"key": key}, or {"error": sentence}.
    """
    if action not in ACTIONS:
        return 404, {"error": f"there is no action {action[:40]!r}; there is {', '.join(ACTIONS)}"}
    try:
        ACTIONS[action](key)
    except downloads.Refused as error:
        return error.status, {"error": str(error)}
    return 200, {"key": key}


def register() -> None:
    """Add the routes to ComfyUI's server."""
    server = access.server()
    if server is None:
        return
    server.routes.get("/pcpo/weights")(reading(lambda _: (200, downloads.listing())))
    server.routes.route("*", "/pcpo/weights/{key}/{action}")(
        changing(lambda at, _: act(at["key"], at["action"]), "a download")
    )
