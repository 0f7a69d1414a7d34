"""The jobs over HTTP, for the panel. Who may ask is decided by access.py.

Reading is GET, changing is POST with a JSON body; a client names jobs by their ids and nothing by
a path. The handlers are thin: each answers with what a plain function here gave, an HTTP status
and an object.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from ...trainers.job.folder import JobError
from ..names import with_current_names
from . import access
from .access import Jobs
from .of_comfyui import every_job, registry
from .own_files import image
from .registry import UnknownJob

Answer = tuple[int, dict[str, Any]]

REQUESTS = ("pause", "continue", "stop", "sample")
ACTIONS = (*REQUESTS, "resume", "delete")
MAX_BODY = 64 << 10
"""Bytes of a request."""


# --- answers -------------------------------------------------------------------------------------


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


def act(jobs: Jobs, id: str, action: str) -> Answer:
    """Carry out an action on a job.

    Args:
        jobs: where it is.
        action: one of `ACTIONS`.

    Returns:
        {"job": summary, "at": when}, or {"error": sentence}.
    """
    if action not in ACTIONS:
        return 404, {"error": f"there is no action {action[:40]!r}; there is {', '.join(ACTIONS)}"}
    try:
        before = jobs.summary(id)
        if action == "delete":
            jobs.delete(id)
            return 200, {"job": before | {"state": "deleted"}, "at": every_job().stamp()}
        if action == "resume":
            jobs.resume(id)
        else:
            jobs.ask(id, action)  # pyright: ignore[reportArgumentType] (one of REQUESTS)
        return 200, jobs.answer(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}
    except (JobError, OSError) as error:
        return 409, {"error": str(error)}


def look(jobs: Jobs, id: str) -> Answer:
    """A job in detail."""
    try:
        return 200, jobs.job(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}


def sample(jobs: Jobs, id: str, iteration: str, index: str) -> bytes | Answer:
    """A sampled image, or why there is none."""
    if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in (iteration, index)):
        return 404, {"error": "an image is named by two whole numbers: iteration and index"}
    try:
        folder = jobs.folder(id)
    except UnknownJob as error:
        return 404, {"error": str(error)}
    found = image(folder.root, folder.samples / f"{int(iteration):05}" / f"{int(index):03}.png")
    missing = f"the job {id} has no image {index} of iteration {iteration}"
    return (404, {"error": missing}) if found is None else found


# --- ComfyUI -------------------------------------------------------------------------------------


def register() -> None:
    """Add the routes to ComfyUI's server, and look after the jobs that an earlier one left."""
    server = access.server()
    if server is None:
        return
    access.watch(server)
    server.add_on_prompt_handler(with_current_names)
    routes = server.routes
    routes.get("/pcpo/jobs")(_read_handler(lambda _: (200, registry().answer())))
    routes.get("/pcpo/jobs/{id}")(_read_handler(lambda at: look(registry(), at["id"])))
    routes.get("/pcpo/jobs/{id}/samples/{iteration}/{index}")(
        _read_handler(lambda at: sample(registry(), at["id"], at["iteration"], at["index"]))
    )
    routes.route("*", "/pcpo/jobs/{id}/{action}")(_change)
    every_job().wake()


def refusal(headers: Mapping[str, str]) -> Answer | None:
    """Why a request gets no answer; None if it may have one."""
    why = access.foreign(headers) or access.wrong_host(headers)
    if why is None and access.is_shared() and access.current_user() is None:
        why = access.NOBODY
    return None if why is None else (403, {"error": why})


def _read_handler(
    find: Callable[[Mapping[str, str]], Answer | bytes],
) -> Callable[[Any], Awaitable[Any]]:
    """A handler that answers with what is found, in a thread of its own: it reads files."""

    async def handler(request: Any) -> Any:
        headers = _headers(request)
        why = refusal(headers)
        if why is not None:
            return _json(why)
        found = await asyncio.to_thread(find, request.match_info)
        return _png(found, headers) if isinstance(found, bytes) else _json(found)

    return handler


async def _change(request: Any) -> Any:
    """The handler of every action."""
    if request.method != "POST":
        return _json((405, {"error": "a job is changed by POST"}), Allow="POST")
    headers = _headers(request)
    fault = refusal(headers) or fault_of(headers, await _body(request))
    if fault is not None:
        return _json(fault)
    at = request.match_info
    return _json(await asyncio.to_thread(partial(act, registry(), at["id"], at["action"])))


def _headers(request: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _png(found: bytes, headers: Mapping[str, str]) -> Any:
    from aiohttp import web

    tag = f'"{zlib.crc32(found):08x}-{len(found)}"'
    said = {"Content-Type": "image/png", "Cache-Control": "no-cache", "ETag": tag}
    if headers.get("if-none-match") == tag:
        return web.Response(status=304, headers=said)
    return web.Response(body=found, headers=said | {"X-Content-Type-Options": "nosniff"})


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
    value = access.public(value) if access.is_shared() else value
    return web.json_response(value, status=status, headers=headers)
