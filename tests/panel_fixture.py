"""A stand-in for ComfyUI's server and page: the panel's files, stubs, and jobs told by a test.

Standard library only. The routes are those of nodes/jobs/routes.py.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import threading
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WEB = HERE.parent / "nodes" / "web"
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html"}
# as ComfyUI sends it with --disable-api-nodes
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self'; connect-src 'self' data:; "
    "frame-src 'self'; object-src 'self';"
)
STUBS = {
    "/scripts/app.js": """
        export const app = {
          registerExtension: (extension) => fixture.extensions.push(extension),
          extensionManager: {
            registerSidebarTab: (tab) => fixture.tabs.push(tab),
            command: { execute: (id) => fixture.commands.push(id) },
          },
          graph: { add: (node) => fixture.nodes.push(node) },
          canvas: { ds: { visible_area: [1000, 2000, 800, 600] } },
        };""",
    "/scripts/api.js": """
        class Api extends EventTarget {
          fetchApi = (route, options) => fetch("/api" + route, options);
          apiURL = (route) => "/api" + route;
        }
        export const api = new Api();
        fixture.say = (type, detail) => api.dispatchEvent(new CustomEvent(type, { detail }));""",
}
SUMMARY = ("id", "name", "state", "iteration", "of", "eta_seconds", "message", "created", "reward",
           "held_out", "before")  # fmt: skip
STATES = ("queued", "preparing", "running", "pausing", "paused", "stopping", "stopped", "done",
          "failed", "lost")  # fmt: skip
AFTER = {"pause": "pausing", "continue": "running", "stop": "stopping", "resume": "queued"}
PROMPTS = [f"a {c} {s}" for c in ("red", "blue", "green", "golden") for s in
           ("ball", "box", "cross", "pyramid")]  # fmt: skip


def job(number: int = 1, state: str = "running", iteration: int = 12, **more: Any) -> dict:
    """A job with all that the routes tell of it; samples are made every 6 iterations."""
    metrics = [line(i) for i in range(1, iteration + 1)]
    kept = range(0, iteration + 1, 6)
    return {
        "id": f"{number:016x}",
        "name": f"scenes_{number}",
        "state": state,
        "iteration": iteration,
        "of": 60,
        "eta_seconds": 9.0 * (60 - iteration),
        "message": None,
        "created": 1_760_000_000 + number,
        "reward": metrics[-1]["reward"] if metrics else None,
        "held_out": next((m["held_out"] for m in reversed(metrics) if "held_out" in m), None),
        "before": 0.4,
        "config": {
            "model": {"source": "demo", "precision": "float32"},
            "trainable": {"kind": "lora", "rank": 16, "alpha": 16.0, "targets": ["to_q", "to_k"]},
            "sampler": {"transition": "ddim", "steps": 8},
            "method": {"credit": "proportionate", "ratio": "epsilon_matching",
                       "objective": "log_hinge", "clip_high": 0.001},
            "rewards": {"scene": 1.0},
            "prompts": {"source": "scenes", "per_iteration": 16, "images_per_prompt": 16},
            "optimizer": {"lr": 0.002},
            "run": {"seed": 0, "device": "cpu", "eval_prompts": 16},
        },
        "metrics": metrics,
        "samples": [samples(i) for i in kept],
        "exports": [f"scenes_{number}_{i:05}.safetensors" for i in kept if i],
        "log": [f"iteration {i}/60  reward {0.4 + i / 200:.3f}" for i in range(1, iteration + 1)],
        "folder": f"/comfyui/user/__pcpo/jobs/{number:016x}",
        **more,
    }  # fmt: skip


def line(iteration: int) -> dict[str, Any]:
    """One iteration's numbers; held-out prompts every 6 iterations."""
    wave = ((iteration * 37) % 11 - 5) / 100
    found = {
        "iteration": iteration,
        "reward": min(0.9, 0.4 + iteration / 150 + wave),
        "reward_std": 0.22 - iteration / 800,
        "clip_fraction": 0.1 + wave,
        "clip_fraction_on_policy": 0.0,
        "outside_fraction": 0.2 + wave,
        "log_ratio_max": 0.005 + abs(wave) / 10,
        "log_ratio_std": 0.0005 + abs(wave) / 100,
        "grad_norm": 0.013 + wave / 10,
        "kl": 0.0001 * iteration,
        "images_per_second": 28 + 20 * wave,
    }
    if iteration % 6 == 0:
        found["held_out"] = min(0.9, 0.42 + iteration / 120)
    return found


def samples(iteration: int) -> dict[str, Any]:
    """Scores of an iteration's samples."""
    scores = [
        {"prompt": prompt, "reward": min(1.0, 0.3 + (i % 5) / 10 + iteration / 200)}
        for i, prompt in enumerate(PROMPTS)
    ]
    return {"iteration": iteration, "scores": scores, "count": len(scores)}


def png(iteration: int, index: int, size: int = 64) -> bytes:
    """A scene: a shape on a ground; its edge is the sharper, the later the iteration."""
    colour = [(210, 50, 40), (50, 90, 210), (40, 160, 70), (220, 170, 40)][(index // 4) % 4]
    soft = max(1.0, 16.0 - iteration / 3)
    rows = []
    for y in range(size):
        row = bytearray(b"\0")
        for x in range(size):
            dx, dy = abs(x - size / 2), abs(y - size / 2)
            far = [(dx * dx + dy * dy) ** 0.5, max(dx, dy), min(dx, dy) + 8, dx + dy][index % 4]
            share = min(1.0, max(0.0, 0.5 + (18 - far) / soft))
            row += bytes(round(share * c + (1 - share) * (225 - y)) for c in colour)
        rows.append(bytes(row))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class PanelServer:
    """Serves on a free port while it is used as a context.

    Attributes:
        jobs: what the routes tell; a test changes them.
        asked: every request under /api, as (method, path, content type, body).
        broken: answers of (status, body) by path, instead of the usual ones.
        has_routes: False plays a ComfyUI in which the pack did not load.
    """

    def __init__(self) -> None:
        self.jobs: list[dict] = []
        self.asked: list[tuple[str, str, str, str]] = []
        self.broken: dict[str, tuple[int, Any]] = {}
        self.has_routes = True
        self.looks = itertools.count(1)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self, "")

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                server.answer(self, self.rfile.read(length).decode())

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing: a test's output is its own."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> PanelServer:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def summaries(self) -> list[dict]:
        """All jobs as lists show them."""
        return [{name: each[name] for name in SUMMARY} for each in self.jobs]

    def message(self) -> dict[str, Any]:
        """What the message "pcpo.jobs" tells, and the answer of GET /pcpo/jobs."""
        return {"jobs": self.summaries(), "at": next(self.looks)}

    def posts(self) -> list[tuple[str, str, str, str]]:
        """The requests that change something."""
        return [each for each in self.asked if each[0] == "POST"]

    def reads(self, path: str) -> int:
        """How often a path was read."""
        return sum(each[:2] == ("GET", path) for each in self.asked)

    def answer(self, handler: BaseHTTPRequestHandler, body: str) -> None:
        """Answer one request."""
        path = handler.path.split("?")[0]
        if path.startswith("/api/"):
            kind = handler.headers.get("Content-Type", "")
            self.asked.append((handler.command, path, kind, body))
            status, data = self.route(handler.command, path)
        else:
            status, data = self.file(path)
        is_bytes = isinstance(data, bytes)
        content = data if is_bytes else json.dumps(data).encode()
        mime = TYPES.get(Path(path).suffix, TYPES[".html"])
        mime = "image/png" if path.startswith("/api/") else mime
        handler.send_response(status)
        handler.send_header("Content-Type", mime if is_bytes else "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.send_header("Content-Security-Policy", POLICY)
        with suppress(ConnectionError):  # the page was closed meanwhile
            handler.end_headers()
            handler.wfile.write(content)

    def file(self, path: str) -> tuple[int, Any]:
        """The page, the stubs, and what lies in nodes/web."""
        if path == "/":
            return 200, (HERE / "panel_fixture.html").read_bytes()
        if path == "/extensions":  # ComfyUI's page imports all of them
            return 200, [f"/extensions/pcpo/{file.name}" for file in sorted(WEB.glob("*.js"))]
        if path in STUBS:
            return 200, STUBS[path].encode()
        file = WEB / path.removeprefix("/extensions/pcpo/")
        return (200, file.read_bytes()) if file.parent == WEB and file.is_file() else (404, b"")

    def route(self, method: str, path: str) -> tuple[int, Any]:
        """The routes under /api/pcpo."""
        if path in self.broken:
            return self.broken[path]
        if not self.has_routes:
            return 404, b"404: Not Found"
        if path == "/api/pcpo/jobs":
            return 200, self.message()
        found = re.fullmatch("/api/pcpo/jobs/([0-9a-f]{16})(/.*)?", path)
        chosen = [each for each in self.jobs if found and each["id"] == found[1]]
        if not found or not chosen:
            return 404, {"error": "There is no such job; it may have been deleted."}
        if found[2] is None:
            return 200, chosen[0] | {"at": next(self.looks)}
        if image := re.fullmatch("/samples/([0-9]+)/([0-9]+)", found[2]):
            return 200, png(int(image[1]), int(image[2]))
        if method != "POST":
            return 405, {"error": "Use POST."}
        return self.act(chosen[0], found[2][1:])

    def act(self, chosen: dict, action: str) -> tuple[int, Any]:
        """What an action of the routes does to a job."""
        if action == "delete":
            self.jobs.remove(chosen)
        chosen["state"] = AFTER.get(action, chosen["state"])
        return 200, {"job": {name: chosen[name] for name in SUMMARY}, "at": next(self.looks)}


if __name__ == "__main__":  # to look at it in a browser
    with PanelServer() as shown:
        shown.jobs = [job(i, state) for i, state in enumerate(STATES, 1)]
        print(shown.url)
        threading.Event().wait()
