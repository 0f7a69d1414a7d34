"""An HTTP server in a thread that answers as a test says, and a reward server in a process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from warm_fixture import first_line, pcpo


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: object


@dataclass(frozen=True)
class Reply:
    """What is sent back: `missing` bytes fewer than it declares, after `delay` seconds."""

    body: object = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    missing: int = 0

    @property
    def raw(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Scripted:
    """A server whose answers a function gives; `asked` holds all requests."""

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.answer, self.asked = answer, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Scripted:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        script = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.loads(raw) if raw else None
                asked = Asked(self.command, self.path, dict(self.headers), body)
                script.asked.append(asked)
                reply = script.answer(asked)
                time.sleep(reply.delay)
                try:
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(reply.raw) + reply.missing))
                    self.end_headers()
                    self.wfile.write(b"" if self.command == "HEAD" else reply.raw)
                except ConnectionError:
                    pass  # the client gave up

            do_GET = do_HEAD = do_POST = _serve

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def in_order(*replies: Reply) -> Callable[[Asked], Reply]:
    """One reply after the other, the last one again and again."""
    left = list(replies)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


class RewardServer:
    """`pcpo rewards serve` in a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = pcpo("rewards", "serve", *arguments, env=environment)
        self.said = first_line(self.process)
        assert self.said.startswith("serving "), (self.said, self.process.communicate(1))
        self.url = self.said.split()[-1]

    def __enter__(self) -> RewardServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
