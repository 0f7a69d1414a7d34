"""The page on which `pcpo taste ask` asks. It is served on this machine alone.

The address holds a secret, without which nothing is answered; a request from another site (its
Host or Origin is not this server's) is refused.
"""

from __future__ import annotations

import hmac
import json
import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config.train_config import ConfigError
from ..errors import UserError
from ..job.files import json_text
from ..report.page import page_of
from ..taste.desk import ACTIONS, Desk
from ..taste.store import Store

TEMPLATE = Path(__file__).with_name("taste_page.html")
BALLOT = Path(__file__).parents[2] / "nodes" / "web" / "ballot.js"
"""What the page shares with the panel in ComfyUI."""
LARGEST = 1 << 16
"""Most bytes of a request."""
POLICY = (
    "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'"
)
"""The page may speak to this server alone."""


class Page(ThreadingHTTPServer):
    """The server of one taste, on a port of the loopback address.

    Args:
        store: of the taste.
        port: 0 takes a free one.
        weights: of the features' network; searched if None.

    Raises:
        ConfigError: if the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, store: Store, port: int = 0, weights: str | None = None) -> None:
        self.desk, self.token = Desk(store, weights=weights), secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"port {port} cannot be listened at ({error.strerror}); give another --port"
            ) from error

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


def serve(store: Store, port: int, weights: str | None = None) -> None:
    """Serve the page until Ctrl-C."""
    with Page(store, port, weights) as page:
        print(f"vote at {page.address}\n(Ctrl-C ends it; every vote is kept at once)", flush=True)
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            print(f"\n{len(store.votes())} votes are in {store.root}")


class _Handler(BaseHTTPRequestHandler):
    server: Page  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        path = self._path()
        if path == "":
            data = {"name": self.server.desk.store.root.resolve().name}
            self._send(200, page_of(TEMPLATE, data["name"], data, [BALLOT]).encode(), "text/html")
        elif path == "ranking":
            self._json(self.server.desk.ranking)
        elif path is not None and path.startswith("image/"):
            self._answer(lambda: self.server.desk.image(path.removeprefix("image/")), "image/png")
        elif path is not None:
            self._refuse(404, "there is nothing here")

    def do_POST(self) -> None:
        path, desk = self._path(), self.server.desk
        if path is None:
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            return self._refuse(413, "the request is too large")
        try:
            asked = json.loads(self.rfile.read(int(length)))
            if not isinstance(asked, dict):
                raise TypeError
        except (ValueError, TypeError, RecursionError):
            return self._refuse(400, "the request is no JSON object")
        if path in ACTIONS:
            self._json(lambda: desk.act(path, asked))
        else:
            self._refuse(404, "there is nothing here")

    def _path(self) -> str | None:
        """What is asked for below the secret; None, answered, if it may not be."""
        here = f"127.0.0.1:{self.server.server_port}"
        origin = self.headers.get("Origin")
        token, _, path = urlsplit(self.path).path.removeprefix("/").partition("/")
        is_known = hmac.compare_digest(token.encode(), self.server.token.encode())
        is_own = self.headers.get("Host") == here and origin in (None, f"http://{here}")
        if is_known and is_own:
            return path
        return self._refuse(403, "open the page at the address that the command printed")

    def _json(self, work: Any) -> None:
        self._answer(lambda: json_text(work()).encode(), "application/json")

    def _answer(self, work: Any, kind: str) -> None:
        try:
            self._send(200, work(), kind)
        except (UserError, OSError) as error:
            self._refuse(409, str(error))

    def _refuse(self, status: int, why: str) -> None:
        self.close_connection = True  # its body may be unread
        self._send(status, json_text({"error": why}).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (
            ("Cache-Control", "no-store" if kind != "image/png" else "private, immutable"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Content-Security-Policy", POLICY),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""
