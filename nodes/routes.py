"""The jobs over HTTP, for the panel: what may be asked, of whom, and by whom.

Reading is GET, changing is POST with a JSON body. Other web sites are refused, whatever ComfyUI
itself allows them; a client names jobs by their ids and nothing by a path. The handlers are thin:
each answers with what a plain function here gave, an HTTP status and an object.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..trainers.job import JobError
from .jobs import JobRegistry, UnknownJob, registry

Answer = tuple[int, dict[str, Any]]

REQUESTS = ("pause", "continue", "stop", "sample")
ACTIONS = (*REQUESTS, "resume", "delete")
MAX_BODY = 64 << 10
"""Bytes of a request."""
PORTS = {"http": 80, "https": 443}


# --- answers -------------------------------------------------------------------------------------


def foreign(headers: Mapping[str, str]) -> str | None:
    """Why a request is not of ComfyUI's own pages; None where it is, or of no page at all.

    Args:
        headers: of the request, found by their names in lower case.

    Returns:
        One sentence, or None.
    """
    if headers.get("sec-fetch-site", "").lower() == "cross-site":
        return "requests of other web sites are refused"
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is None:
        return None
    try:
        came = urlsplit(origin)
        goes = urlsplit(f"//{host}")
        default = PORTS.get(came.scheme)
        is_same = came.hostname is not None and came.hostname == goes.hostname
        is_same = is_same and (came.port or default) == (goes.port or default)
    except ValueError:  # a port that is no number
        is_same = False
    return None if is_same else "requests of other web sites are refused"


def fault_of(headers: Mapping[str, str], body: bytes | None) -> Answer | None:
    """Why a changing request is refused; None where it is not.

    Args:
        headers: of the request, found by their names in lower case.
        body: of the request; None where it is larger than `MAX_BODY`.

    Returns:
        The answer, or None.
    """
    if body is None:
        return 413, {"error": f"the request is larger than {MAX_BODY >> 10} KiB"}
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, {"error": "the request must have Content-Type application/json"}
    try:
        is_object = isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        is_object = False
    return None if is_object else (400, {"error": "the request must be a JSON object"})


def act(jobs: JobRegistry, id: str, action: str) -> Answer:
    """Do something with a job.

    Args:
        jobs: where it is.
        id: of the job, as the client gave it.
        action: one of `ACTIONS`.

    Returns:
        {"job": summary}, or {"error": sentence}.
    """
    if action not in ACTIONS:
        return 404, {"error": f"there is no action {action[:40]!r}; there is {', '.join(ACTIONS)}"}
    try:
        before = jobs.summary(id)
        if action == "delete":
            jobs.delete(id)
            return 200, {"job": before | {"state": "deleted"}}
        if action == "resume":
            jobs.resume(id)
        else:
            jobs.ask(id, action)  # pyright: ignore[reportArgumentType] (one of REQUESTS)
        return 200, {"job": jobs.summary(id)}
    except UnknownJob as error:
        return 404, {"error": str(error)}
    except (JobError, OSError) as error:
        return 409, {"error": str(error)}


def look(jobs: JobRegistry, id: str) -> Answer:
    """A job in detail."""
    try:
        return 200, jobs.job(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}


def sample(jobs: JobRegistry, id: str, iteration: str, index: str) -> Path | Answer:
    """The file of a sampled image, or why there is none."""
    if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in (iteration, index)):
        return 404, {"error": "an image is named by two whole numbers: iteration and index"}
    try:
        return jobs.sample(id, int(iteration), int(index))
    except UnknownJob as error:
        return 404, {"error": str(error)}


# --- ComfyUI -------------------------------------------------------------------------------------


def comfyui() -> dict[str, Any]:
    """What a registry has to know of this ComfyUI, as its keyword arguments."""
    import folder_paths

    root = Path(folder_paths.get_system_user_directory("pcpo")) / "jobs"
    server = _server()
    if server is None:
        return {"root": root}

    def notify(jobs: list[dict[str, Any]]) -> None:
        with suppress(RuntimeError):  # its loop has ended, and with it all that listen
            server.send_sync("pcpo.jobs", {"jobs": jobs})

    def is_busy() -> bool:
        return server.prompt_queue.get_tasks_remaining() > 0

    return {"root": root, "notify": notify, "is_busy": is_busy}


def _server() -> Any:
    """ComfyUI's running server; None where the pack is loaded without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def register() -> None:
    """Add the routes to ComfyUI's server, and look after the jobs that an earlier one left."""
    server = _server()
    if server is None:
        return
    routes = server.routes
    routes.get("/pcpo/jobs")(_reading(lambda _: (200, {"jobs": registry().jobs()})))
    routes.get("/pcpo/jobs/{id}")(_reading(lambda at: look(registry(), at["id"])))
    routes.get("/pcpo/jobs/{id}/samples/{iteration}/{index}")(
        _reading(lambda at: sample(registry(), at["id"], at["iteration"], at["index"]))
    )
    routes.route("*", "/pcpo/jobs/{id}/{action}")(_change)
    registry().wake()


def _reading(find: Callable[[Mapping[str, str]], Answer | Path]) -> Callable[[Any], Awaitable[Any]]:
    """A handler that answers with what is found, in a thread of its own: it reads files."""

    async def handler(request: Any) -> Any:
        from aiohttp import web

        why = foreign(_headers(request))
        if why is not None:
            return _json((403, {"error": why}))
        found = await asyncio.to_thread(find, request.match_info)
        if isinstance(found, Path):
            headers = {"Content-Type": "image/png", "Cache-Control": "no-cache"}
            return web.FileResponse(found, headers=headers)
        return _json(found)

    return handler


async def _change(request: Any) -> Any:
    """The handler of every action."""
    if request.method != "POST":
        return _json((405, {"error": "a job is changed by POST"}), Allow="POST")
    headers = _headers(request)
    why = foreign(headers)
    if why is not None:
        return _json((403, {"error": why}))
    fault = fault_of(headers, await _body(request))
    if fault is not None:
        return _json(fault)
    at = request.match_info
    return _json(await asyncio.to_thread(partial(act, registry(), at["id"], at["action"])))


def _headers(request: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


async def _body(request: Any) -> bytes | None:
    """The body; None where it is too large, of which no more than that is read."""
    if (request.content_length or 0) > MAX_BODY:
        return None
    body = b""
    async for part in request.content.iter_chunked(8 << 10):
        body += part
        if len(body) > MAX_BODY:
            return None
    return body


def _json(answer: Answer, **headers: str) -> Any:
    from aiohttp import web

    status, value = answer
    return web.json_response(value, status=status, headers=headers)
