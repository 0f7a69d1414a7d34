"""The ASGI application of a reward server. Its protocol: `pcpo.remote.protocol`."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...pcpo.remote import protocol
from ...pcpo.remote.http import WebError, is_loopback, parse_json
from ...pcpo.remote.messages import Health, Limits, Prompts, Question
from ...pcpo.rewards import Reward

BODY_SECONDS = 60.0
"""Seconds in which a request's body has to arrive."""

AT_ONCE, OF_ONE = 8, 2
"""Requests whose bodies are in memory, in all and of one address; the others wait."""

PARTS = 1 << 20
"""Brackets, braces and commas in a request: each may become an object of its own."""

Asked = TypeVar("Asked", bound=Prompts)


@dataclass(frozen=True)
class Service:
    """Rewards behind HTTP. They score in a thread, one request after the other.

    Attributes:
        batch: most images in one request.
        pixels: of all images of a request together.
        key: that a request must carry; empty for none.
        is_local: whether only this machine can reach it, by a name of its own.
    """

    rewards: Mapping[str, Reward]
    batch: int = protocol.BATCH
    request_bytes: int = protocol.REQUEST_BYTES
    pixels: int = protocol.PIXELS
    key: str = ""
    is_local: bool = True
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    rooms: WeakValueDictionary[str, asyncio.Semaphore] = field(default_factory=WeakValueDictionary)

    def application(self) -> Starlette:
        routes = [
            Route("/health", self._with_key(self.health)),
            Route("/rewards/{name}", self._with_key(self.describe)),
            Route("/rewards/{name}/complaints", self._with_key(self.complaints), methods=["POST"]),
            Route("/rewards/{name}/score", self._with_key(self.score), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: _refusal, Exception: _failure}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Any:
        """The names of the rewards, and the limits of a request."""
        limits = Limits(batch=self.batch, request_bytes=self.request_bytes, pixels=self.pixels)
        return Health(version=1, rewards=list(self.rewards), limits=limits).model_dump()

    async def describe(self, request: Request) -> Any:
        name, reward = self._request(request)
        return await self._in_turn(request, lambda: protocol.describe(name, reward))

    async def complaints(self, request: Request) -> Any:
        """Why prompts cannot be scored."""
        _, reward = self._request(request)
        return await self._answer_body(request, lambda body: complaints(reward, body, self.batch))

    async def score(self, request: Request) -> Any:
        """Score images. One that cannot be read is an error of its own."""
        _, reward = self._request(request)
        return await self._answer_body(
            request, lambda body: score(reward, body, self.batch, self.pixels)
        )

    def _request(self, request: Request) -> tuple[str, Reward]:
        name = request.path_params["name"]
        if name not in self.rewards:
            there = ", ".join(self.rewards)
            raise HTTPException(404, f"there is no reward {name!r} here; there is {there}")
        return name, self.rewards[name]

    def _with_key(
        self, answer: Callable[[Request], Awaitable[Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Answer as JSON, after checking the key."""
        wanted = f"Bearer {self.key}".encode()

        async def endpoint(request: Request) -> Response:
            if self.is_local and not self.key and not _is_named_loopback(request):
                raise HTTPException(403, "ask this server by the name localhost or 127.0.0.1")
            given = request.headers.get("authorization", "").encode()
            if self.key and not hmac.compare_digest(given, wanted):
                raise HTTPException(401, "this server wants a key: set PCPO_REWARDS_KEY")
            return JSONResponse(await answer(request))

        return endpoint

    async def _answer_body(self, request: Request, judge: Callable[[Any], Any]) -> Any:
        """Answer a request with a body, when there is room for it."""
        address = request.client.host if request.client else ""
        own = self.rooms.setdefault(address, asyncio.Semaphore(OF_ONE))
        async with own, self.room:
            raw = await self._body(request)
            return await self._in_turn(request, lambda: judge(_read(raw)))

    async def _body(self, request: Request) -> bytearray:
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
            return raw
        except TimeoutError as error:
            raise HTTPException(408, "the request took too long to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the request broke off") from error

    async def _in_turn(self, request: Request, work: Callable[[], Any]) -> Any:
        async with self.turn:
            if await request.is_disconnected():  # who asked has given up, and may ask again
                raise HTTPException(400, "the request broke off")
            try:
                return await run_in_threadpool(work)
            except protocol.TooMuch as error:
                raise HTTPException(413, str(error)) from error
            except WebError as error:
                raise HTTPException(400, f"the request is {error}") from error
            except ValueError as error:
                raise HTTPException(422, str(error)) from error


def _is_named_loopback(request: Request) -> bool:
    """Whether the request names this machine; one from a page on the web names another host."""
    try:
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return False
    return is_loopback(host.rstrip("."))


def _read(raw: bytearray) -> Any:
    count = sum(raw.count(mark) for mark in (b"[", b"{", b","))
    if count > PARTS:
        raise protocol.TooMuch(f"the request has {count} parts; at most {PARTS} go into one")
    return parse_json(raw)


def _parse_request(kind: type[Asked], body: Any, batch: int) -> Asked:
    asked = kind.read(body)
    if (count := len(asked.prompts)) > batch:
        raise protocol.WireError(f"the request has {count} prompts; at most {batch} go into one")
    return asked


def complaints(reward: Reward, body: Any, batch: int) -> dict[str, Any]:
    """Why the prompts of a request cannot be scored; at most `batch` of them."""
    prompts = _parse_request(Prompts, body, batch).prompts
    long = [protocol.too_long(prompt) for prompt in prompts]
    others = reward.complaints(["" if why else p for p, why in zip(prompts, long, strict=True)])
    return {"complaints": [why or other for why, other in zip(long, others, strict=True)]}


def score(reward: Reward, body: Any, batch: int, pixels: int) -> dict[str, Any]:
    """The scores of a request of at most `batch` images and `pixels` pixels in all.

    An image that cannot be read has an error instead of a value.

    Raises:
        TooMuch: if there are more pixels.
        WireError: if it is no request for scores.
    """
    question = _parse_request(Question, body, batch)
    files, prompts = question.images, question.prompts
    if len(files) != len(prompts):
        raise protocol.WireError(f"there are {len(prompts)} prompts for {len(files)} images")
    errors = [protocol.too_long(prompt) for prompt in prompts]
    total = sum(protocol.pixels_in(file, pixels) for file in files)
    if total > pixels:
        raise protocol.TooMuch(
            f"the images have {total} pixels; at most {pixels} go into one request"
        )
    pictures = {}
    for row, file in enumerate(files):
        try:
            if errors[row] is None:
                pictures[row] = protocol.decode_picture(file, pixels)
        except protocol.WireError as error:
            errors[row] = str(error)
    scores = reward.score(list(pictures.values()), [prompts[row] for row in pictures])
    return protocol.encode_scores(
        protocol.put_scores(protocol.failed_scores(errors), list(pictures), scores)
    )


def _refusal(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _failure(request: Request, error: Exception) -> Response:
    """Answer an unforeseen error; the traceback goes to the server's own log."""
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
