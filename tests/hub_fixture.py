"""A hub on this machine: the few answers of the Hugging Face hub that a download needs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@contextmanager
def hub(files: Mapping[str, bytes], sent: Mapping[str, bytes] = {}) -> Iterator[str]:
    """Serve files.

    Args:
        files: by "owner/name/file", as the hub describes them.
        sent: what is sent in place of one, by the same.

    Yields:
        The address.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(is_head=True)

        def do_GET(self):
            self.answer(is_head=False)

        def answer(self, *, is_head):
            owner, name, _, _, file = self.path.lstrip("/").split("/", 4)
            key = f"{owner}/{name}/{file}"
            if key not in files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            data = sent.get(key, files[key])
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(files[key]).hexdigest()}"')
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not is_head:
                self.wfile.write(data)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
