"""JSON over ComfyUI's server: who is refused, how a body is read, how an answer is sent.

Reading is GET, changing is POST with a JSON body. What answers is a plain function that gives an
HTTP status and an object.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from . import access

Answer = tuple[int, dict[str, Any]]
At = Mapping[str, str]
"""The parts of a route."""

MAX_BODY = 64 << 10
"""Bytes of a request."""


def refusal(headers: Mapping[str, str]) -> Answer | None:
    """Why a request gets no answer; None if it may have one."""
    why = access.foreign(headers) or access.wrong_host(headers)
    if why is None and access.is_shared() and access.current_user() is None:
        why = access.NOBODY
    return None if why is None else (403, {"error": why})


def object_of(headers: Mapping[str, str], body: bytes | None) -> dict[str, Any] | Answer:
    """The object that a changing request holds, or why the request is refused.

    Args:
        headers: of the request, found by their names in lower case.
        body: of the request; None where it is larger than `MAX_BODY`.
    """
    if body is None:
        return 413, {"error": f"the request is larger than {MAX_BODY >> 10} KiB"}
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return 415, {"error": "the request must have Content-Type application/json"}
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    return (
        found if isinstance(found, dict) else (400, {"error": "the request must be a JSON object"})
    )


def reading(
    find: Callable[[At], Answer | bytes], *, is_kept: bool = True
) -> Callable[[Any], Awaitable[Any]]:
    """A handler that answers with what is found, in a thread of its own: it reads files.

    Args:
        find: an object, or an image.
        is_kept: whether a browser may keep the image.
    """

    async def handler(request: Any) -> Any:
        headers = _headers(request)
        why = refusal(headers)
        if why is not None:
            return _json(why)
        found = await asyncio.to_thread(find, request.match_info)
        return _png(found, headers, is_kept) if isinstance(found, bytes) else _json(found)

    return handler


def changing(
    act: Callable[[At, dict[str, Any]], Answer], what: str
) -> Callable[[Any], Awaitable[Any]]:
    """A handler that does what an object asks for, likewise; of `what`, in an error."""

    async def handler(request: Any) -> Any:
        if request.method != "POST":
            return _json((405, {"error": f"{what} is changed by POST"}), Allow="POST")
        headers = _headers(request)
        asked = refusal(headers) or object_of(headers, await _body(request))
        if isinstance(asked, tuple):
            return _json(asked)
        return _json(await asyncio.to_thread(partial(act, request.match_info, asked)))

    return handler


def _headers(request: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in request.headers.items()}


def _png(found: bytes, headers: Mapping[str, str], is_kept: bool) -> Any:
    from aiohttp import web

    tag = f'"{zlib.crc32(found):08x}-{len(found)}"'
    kept = "no-cache" if is_kept else "no-store"
    said = {"Content-Type": "image/png", "Cache-Control": kept, "ETag": tag}
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
