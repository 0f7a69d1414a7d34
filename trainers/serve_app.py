"""The ASGI application of a reward server. What is said over HTTP: `pcpo.rewards.wire`."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..pcpo.rewards import Reward, wire
from ..pcpo.rewards.web import WebError, parsed

BODY_SECONDS = 60.0
"""That a request's body may take to arrive."""


@dataclass(frozen=True)
class Service:
    """Rewards behind HTTP. They score in a thread, one request after the other.

    Attributes:
        rewards: by name, loaded.
        batch: most images in one request.
        request_bytes: of the largest request.
        key: that a request has to carry; none has to where it is empty.
    """

    rewards: Mapping[str, Reward]
    batch: int = wire.BATCH
    request_bytes: int = wire.REQUEST_BYTES
    key: str = ""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def application(self) -> Starlette:
        """The application, to be run by an ASGI server."""
        routes = [
            Route("/health", self._guarded(self.health)),
            Route("/rewards/{name}", self._guarded(self.describe)),
            Route("/rewards/{name}/complaints", self._guarded(self.complaints), methods=["POST"]),
            Route("/rewards/{name}/score", self._guarded(self.score), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _refusal, Exception: _failure}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Any:
        """Which rewards there are, and what fits into a request."""
        return wire.health(list(self.rewards), self.batch, self.request_bytes)

    async def describe(self, request: Request) -> Any:
        """What a reward is."""
        name, reward = self._asked(request)
        return await self._in_turn(request, lambda: wire.describe(name, reward))

    async def complaints(self, request: Request) -> Any:
        """Why prompts cannot be judged by."""
        _, reward = self._asked(request)
        body = await self._body(request)

        def judge() -> Any:
            prompts = wire.texts(wire.listed(body, "prompts"), "prompts")
            return {"complaints": reward.complaints(prompts)}

        return await self._in_turn(request, judge)

    async def score(self, request: Request) -> Any:
        """Score images. One that cannot be read is an error of its own."""
        _, reward = self._asked(request)
        body = await self._body(request)
        return await self._in_turn(request, lambda: score(reward, body, self.batch))

    def _asked(self, request: Request) -> tuple[str, Reward]:
        name = request.path_params["name"]
        if name not in self.rewards:
            there = ", ".join(self.rewards)
            raise HTTPException(404, f"there is no reward {name!r} here; there is {there}")
        return name, self.rewards[name]

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """The answer as JSON, for those who have the key."""
        wanted = f"Bearer {self.key}".encode()

        async def endpoint(request: Request) -> Response:
            given = request.headers.get("authorization", "").encode()
            if self.key and not hmac.compare_digest(given, wanted):
                raise HTTPException(401, "this server wants a key: set PCPO_REWARDS_KEY")
            return JSONResponse(await answer(request))

        return endpoint

    async def _body(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # which no web page may send here unasked
            raise HTTPException(415, f"a request is application/json, not {kind!r}")
        raw = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    raw += part
                    if len(raw) > self.request_bytes:
                        why = f"a request has at most {self.request_bytes} bytes"
                        raise HTTPException(413, why)
            return await run_in_threadpool(parsed, bytes(raw))
        except TimeoutError as error:
            raise HTTPException(408, "the request took too long to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the request broke off") from error
        except WebError as error:
            raise HTTPException(400, f"the request is {error}") from error

    async def _in_turn(self, request: Request, work: Callable[[], Any]) -> Any:
        async with self.turn:
            if await request.is_disconnected():  # who asked has given up, and may ask again
                raise HTTPException(400, "the request broke off")
            try:
                return await run_in_threadpool(work)
            except ValueError as error:
                raise HTTPException(422, str(error)) from error


def score(reward: Reward, body: Any, batch: int) -> dict[str, Any]:
    """The scores of a request.

    Args:
        reward: that scores.
        body: the request.
        batch: most images in it.

    Returns:
        The answer; an image that cannot be read has an error instead of a value.

    Raises:
        WireError: where it is no request for scores.
    """
    files = wire.listed(body, "images", batch)
    prompts = wire.texts(wire.listed(body, "prompts"), "prompts")
    if len(files) != len(prompts):
        raise wire.WireError(f"there are {len(prompts)} prompts for {len(files)} images")
    errors: list[str | None] = [None] * len(files)
    pictures = {}
    for row, file in enumerate(files):
        try:
            pictures[row] = wire.decode_picture(file)
        except wire.WireError as error:
            errors[row] = str(error)
    found = reward.score(list(pictures.values()), [prompts[row] for row in pictures])
    return wire.encode_scores(wire.put(wire.refused(errors), list(pictures), found))


def _refusal(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _failure(request: Request, error: Exception) -> Response:
    """What nobody foresaw; the traceback goes to the server's own log."""
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
