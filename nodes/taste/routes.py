"""The tastes over HTTP, for the panel's page. Who may ask is decided as for jobs.

A client names a taste by its name, a picture by its digest and a job by its id.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...trainers.errors import UserError
from ...trainers.taste.desk import ACTIONS
from ..errors import NodeError
from ..jobs import access
from ..jobs.handlers import Answer, changing, reading
from ..jobs.of_comfyui import registry
from ..jobs.own_files import image
from . import desks, places


def tastes() -> Answer:
    """The names of all, and how many votes and waiting pairs each has."""
    found = []
    for name in places.names():
        status, about = _told(lambda name=name: _brief(name))
        found.append(about if status == 200 else {"name": name, **about})
    return 200, {"tastes": found}


def _brief(name: str) -> dict[str, Any]:
    store = desks.desk(name).store
    about = {"votes": len(store.votes()), "waiting": len(store.waiting())}
    return {"name": name, "folder": str(store.root), **about}


def look(name: str) -> Answer:
    """A taste with its last votes and what it knows."""

    def seen() -> dict[str, Any]:
        desk = desks.desk(name)
        desk.catch_up()
        return {**_brief(name), **desk.state()}

    return _told(seen)


def ranking(name: str) -> Answer:
    """The digests of the pictures that it ranks first and last."""
    return _told(lambda: desks.desk(name).ranking())


def picture(name: str, digest: str) -> bytes | Answer:
    """A picture that the taste holds, or why there is none."""
    status, about = _told(lambda: {"store": desks.desk(name).store})
    if status != 200:
        return status, about
    is_digest = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    store = about["store"]
    found = image(store.root, store.image_file(digest)) if is_digest else None
    return found or (404, {"error": "the picture is gone; reload the page"})


def create(asked: dict[str, Any]) -> Answer:
    """Make an empty taste of the "name"."""
    made = _told(lambda: {"name": places.new_taste(str(asked.get("name", ""))).root.name})
    return max(409, made[0]) if made[0] != 200 else 200, made[1]


def act(name: str, action: str, asked: dict[str, Any]) -> Answer:
    """Do something on a taste.

    Args:
        name: of the taste.
        action: one of the desk's; "delete"; or "ask" about the samples of a "job".
        asked: what comes with it.

    Returns:
        What the desk shows, or {"name", "pairs"}; {"error": sentence} where that failed.
    """

    def ask() -> dict[str, Any]:
        folder = registry().folder(str(asked.get("job", "")))
        return {"name": name, "pairs": desks.ask_about(desks.desk(name), folder)}

    def delete() -> dict[str, Any]:
        desks.delete(name)
        return {"name": name}

    work: dict[str, Callable[[], dict[str, Any]]] = {"ask": ask, "delete": delete}
    work |= {each: lambda: desks.desk(name).act(action, asked) for each in ACTIONS}
    if action not in work:
        return 404, {"error": f"there is no action {action[:40]!r}; there is {', '.join(work)}"}
    return _told(work[action])


def _told(work: Callable[[], dict[str, Any]]) -> Answer:
    """What a task gives, or why it cannot."""
    try:
        return 200, work()
    except NodeError as error:  # there is no such taste
        return 404, {"error": str(error)}
    except (UserError, OSError) as error:
        return 409, {"error": str(error)}


# --- ComfyUI -------------------------------------------------------------------------------------


def register() -> None:
    """Add the routes to ComfyUI's server."""
    server = access.server()
    if server is None:
        return
    routes = server.routes
    routes.get("/pcpo/tastes")(reading(lambda _: tastes()))
    routes.post("/pcpo/tastes")(changing(lambda _, asked: create(asked), "a taste"))
    routes.get("/pcpo/tastes/{name}")(reading(lambda at: look(at["name"])))
    routes.get("/pcpo/tastes/{name}/ranking")(reading(lambda at: ranking(at["name"])))
    routes.get("/pcpo/tastes/{name}/images/{digest}")(
        reading(lambda at: picture(at["name"], at["digest"]), is_kept=False)
    )
    routes.route("*", "/pcpo/tastes/{name}/{action}")(
        changing(lambda at, asked: act(at["name"], at["action"], asked), "a taste")
    )
