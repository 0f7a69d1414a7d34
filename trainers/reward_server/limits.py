"""Limits on a client of a reward server: connections, and the time to send a request."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_of(idle_seconds: float, connections: int, of_one: int) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with limits on connections, as a class for `uvicorn.Config`.

    Args:
        idle_seconds: that the head of a request may take.
        connections: at once, 503 beyond.
        of_one: connections of one address at once, 429 beyond.
    """
    held = Counter[str]()

    class Limited(H11Protocol):
        address = ""
        seen: Any = None
        watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self.address = self.client[0] if self.client else ""
            held[self.address] += 1
            if held[self.address] > of_one:
                self.refuse(429, f"one address may have {of_one} connections at once")
            elif held.total() > connections:
                self.refuse(503, f"there are {connections} connections already")
            else:
                self.watch = self.loop.call_later(idle_seconds, self.look)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            held[self.address] -= 1
            if not held[self.address]:
                del held[self.address]
            if self.watch:
                self.watch.cancel()

        def look(self) -> None:
            """Close a connection that has no request, and had none at the last check."""
            is_waiting = self.cycle is None or self.cycle.response_complete
            if is_waiting and self.cycle is self.seen:
                self.transport.abort()
            else:
                self.seen = self.cycle
                self.watch = self.loop.call_later(idle_seconds, self.look)

        def refuse(self, status: int, why: str) -> None:
            body = json.dumps({"error": f"{why}; try again"})
            head = f"HTTP/1.1 {status} Busy\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
            size = f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write((head + size + body).encode())
            self.transport.close()

    return Limited
