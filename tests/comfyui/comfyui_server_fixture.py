"""A real ComfyUI server with this pack in it, in a folder of its own.

    with comfyui_server_fixture.Server(host, folder) as server:
        history = server.run(graph)    # API format; raises AssertionError where it fails
        server.log()                   # all it has printed

COMFYUI_PYTHON names the Python to run it with (this one where unset), COMFYUI_FRONTEND a folder
`static` of another comfyui-frontend-package than the one that this Python has, COMFYUI_NODES_2=1
has that page draw Nodes 2.0.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import comfyui_pcpo

PACK = Path(comfyui_pcpo.__path__[0])
FOLDERS = ("custom_nodes", "input", "models", "output", "temp", "user")


def choose(folder: Path, **settings: Any) -> None:
    """Set ComfyUI's settings ("Locale") before a server begins; no templates cover its page."""
    file = folder / "user" / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True)
    nodes = {"VueNodes.Enabled": os.environ.get("COMFYUI_NODES_2") == "1"}
    chosen = {"TutorialCompleted": True} | nodes | settings
    file.write_text(json.dumps({f"Comfy.{name}": chosen[name] for name in chosen}), "utf-8")


class Server:
    """A server on a free port, on the CPU.

    Args:
        host: the ComfyUI checkout.
        folder: an empty folder, for all that the server reads and writes.
        options: more of its command line.
    """

    def __init__(self, host: str | Path, folder: Path, *options: str):
        self.folder, self.host = folder, Path(host)
        for name in FOLDERS:
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "custom_nodes" / "ComfyUI-PCPO").symlink_to(PACK, target_is_directory=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        named = ["--port", str(self.port), "--base-directory", str(folder)]
        fixed = ["--cpu", "--disable-auto-launch", "--disable-all-custom-nodes"]
        chosen = ["--whitelist-custom-nodes", "ComfyUI-PCPO"]
        other = os.environ.get("COMFYUI_FRONTEND")
        shown = ["--front-end-root", other] if other else []
        self.command = [python, "main.py", *fixed, *chosen, *named, *shown, *options]

    def __enter__(self) -> Server:
        with (self.folder / "server.log").open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.host, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait(300)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()[-3000:]
            try:
                self.get("/system_stats")
            except OSError:
                time.sleep(0.3)
            else:
                return
        raise TimeoutError(self.log()[-3000:])

    def log(self) -> str:
        """What it has printed."""
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, content: Any) -> Any:
        """Post JSON; the answer's JSON, also of a refusal."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as refused:
            return json.load(refused)

    def run(self, graph: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Queue a graph and wait for its end.

        Args:
            graph: in API format.
            seconds: to wait for it.

        Returns:
            Its outputs by node.
        """
        history = self.history(graph, seconds)
        assert history["status"]["status_str"] == "success", history["status"]["messages"]
        return history["outputs"]

    def history(self, graph: dict[str, Any], seconds: float = 300) -> dict[str, Any]:
        """Queue a graph and wait for its end, good or bad.

        Args:
            graph: in API format.
            seconds: to wait for it.

        Returns:
            Its status and outputs.
        """
        answer = self.post("/prompt", {"prompt": graph, "client_id": "tests"})
        assert "prompt_id" in answer, answer
        return self.ended(answer["prompt_id"], seconds)

    def ended(self, id: str, seconds: float = 300) -> dict[str, Any]:
        """Wait for the end of what was queued.

        Returns:
            Its status and outputs.

        Raises:
            TimeoutError: where it has not ended by then.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            history = self.get(f"/history/{id}")
            if history:
                return history[id]
            time.sleep(0.2)
        raise TimeoutError(self.log()[-3000:])
