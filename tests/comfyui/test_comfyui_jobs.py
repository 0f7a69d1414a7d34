"""Jobs in real ComfyUI: either side is killed, the routes are attacked, and nothing is lost.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from comfyui_fixture import HOST, PYTHON, needs_host
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_server_fixture import Server

pytestmark = needs_host
SMALL = {
    "prompts": {"per_iteration": 2, "images_per_prompt": 2},
    "sampler": {"steps": 3},
    "advantage": {"min_count": 3},
    "run": {
        "iterations": 8,
        "micro_batch": 4,
        "save_every": 8,
        "eval_prompts": 2,
        "eval_steps": 2,
        "device": "cpu",
    },
}
LISTENER = """
import asyncio, json, sys, time, aiohttp
async def main(url):
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        print("connected", flush=True)
        async for message in socket:
            said = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {}
            if said.get("type") == "pcpo.jobs":
                print(json.dumps([time.monotonic(), said["data"]["jobs"]]), flush=True)
asyncio.run(main(sys.argv[1]))
"""


IMAGE = b"\x89PNG\r\n\x1a\n"


class Jobs:
    """The jobs of a server's folder, from both sides: its files, and its routes."""

    def __init__(self, base: Path) -> None:
        self.base, self.root = base, base / "user" / "__pcpo" / "jobs"
        self.server: Server | None = None

    @contextmanager
    def serving(self, *options: str) -> Iterator[Server]:
        """A server, after which workers go on as they are set to."""
        (self.base / "custom_nodes" / "ComfyUI-PCPO").unlink(missing_ok=True)
        with Server(HOST, self.base, *options) as self.server:
            yield self.server

    def add(self, name: str, device: str = "cpu", iterations: int = 8, **settings: Any) -> str:
        """A job that waits to be resumed, as the node makes it."""
        config = TrainConfig.model_validate(
            SMALL | {"run": SMALL["run"] | {"iterations": iterations}}
        ).model_dump(mode="json")
        id = secrets.token_hex(8)
        about = {"name": name, "created": time.time(), "device": device, "settings": settings}
        folder = JobFolder(self.root / id)
        folder.start({"config": config, **about, "inputs": {}})
        folder.status("stopped")
        return id

    def folder(self, id: str) -> JobFolder:
        return JobFolder(self.root / id)

    def post(self, id: str, action: str) -> dict[str, Any]:
        assert self.server is not None
        return self.server.post(f"/pcpo/jobs/{id}/{action}", {})

    def get(self, id: str) -> dict[str, Any]:
        assert self.server is not None
        return self.server.get(f"/pcpo/jobs/{id}")

    def until(self, id: str, *states: str, more: Callable[[], bool] = lambda: True) -> Any:
        """The job, once the server says that it is in one of the states."""
        end = time.monotonic() + 300
        while (job := self.get(id))["state"] not in states or not more():
            assert time.monotonic() < end, (job["state"], job["message"], job["log"])
            assert job["state"] not in {"failed", "lost"} - set(states), (
                job["message"],
                job["log"],
            )
            time.sleep(0.1)
        return job

    def has_lines(self, id: str, count: int) -> Callable[[], bool]:
        return lambda: len(self.folder(id).metrics()) >= count

    def end_of_worker(self, id: str) -> dict[str, Any]:
        """The status on disk, once no worker holds the folder."""
        end = time.monotonic() + 120
        while self.folder(id).is_held():
            assert time.monotonic() < end
            time.sleep(0.1)
        return self.folder(id).read("status.json")


@pytest.fixture
def jobs(tmp_path) -> Iterator[Jobs]:
    made = Jobs(tmp_path)
    yield made
    for folder in map(JobFolder, made.root.glob("*")):
        if folder.root.is_dir() and folder.is_held():
            os.kill(folder.read("status.json")["pid"], signal.SIGKILL)


def kill(server: Server, kind: int) -> None:
    server.process.send_signal(kind)
    server.process.wait(60)


def test_killed_workers_and_servers_cost_nothing(jobs):
    """Three jobs of one config: one undisturbed, one that is killed and stopped in every way, one
    that goes on through the death of two servers. Their LoRAs are the same bytes."""
    length = 24  # a server needs seconds to end, in which the job must not be done
    straight = jobs.add("straight", iterations=length)
    broken = jobs.add("broken", iterations=length, on_server_exit="save_and_stop")
    lasting = jobs.add("lasting", "cuda:7", iterations=length, on_server_exit="continue")
    with jobs.serving() as server:
        assert jobs.post(straight, "resume")["job"]["state"] in ("queued", "preparing")
        assert jobs.post(broken, "resume")["job"]["state"] == "queued"
        jobs.post(lasting, "resume")
        jobs.until(lasting, "running", more=jobs.has_lines(lasting, 1))
        jobs.post(lasting, "pause")
        assert jobs.get(broken)["state"] == "queued"  # its device is not free
        jobs.until(straight, "done")
        jobs.until(broken, "running", more=jobs.has_lines(broken, 1))
        os.kill(jobs.folder(broken).read("status.json")["pid"], signal.SIGKILL)
        assert "killed" in jobs.until(broken, "lost")["message"]
        jobs.post(broken, "resume")
        jobs.until(broken, "running", more=jobs.has_lines(broken, 2))
        kill(server, signal.SIGKILL)
    ended = jobs.end_of_worker(broken)
    assert ended["state"] == "stopped" and "because ComfyUI ended" in ended["message"]
    assert jobs.folder(lasting).state()["state"] in ("paused", "pausing")  # still there

    with jobs.serving() as server:
        assert jobs.get(broken)["state"] == "stopped"
        jobs.until(lasting, "paused")
        jobs.post(broken, "resume")
        jobs.until(broken, "running", more=jobs.has_lines(broken, 4))
        kill(server, signal.SIGTERM)
    assert jobs.end_of_worker(broken)["state"] == "stopped"

    with jobs.serving():
        jobs.post(lasting, "continue")
        jobs.post(broken, "resume")
        jobs.until(lasting, "done")
        jobs.until(broken, "done")
    exports = [jobs.folder(id).last_export() for id in (straight, broken, lasting)]
    assert [file.name for file in exports] == ["pcpo_00024.safetensors"] * 3
    assert len({file.read_bytes() for file in exports}) == 1


# --- the routes ----------------------------------------------------------------------------------


def raw(server: Server, method: str, path: str, body: bytes | None = b"{}", **headers: str):
    """A request with its path as it is; status, headers and JSON of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    kinds = {"Content-Type": "application/json"}
    sent = {k.replace("_", "-"): v for k, v in {**kinds, **headers}.items()}
    try:
        connection.request(method, path, body if method != "GET" else None, sent)
        answer = connection.getresponse()
        content = answer.read()
    finally:
        connection.close()
    kind = answer.headers.get("Content-Type", "")
    return answer.status, answer.headers, json.loads(content) if "json" in kind else content


def test_attacks_are_refused(jobs):
    """With --enable-cors-header ComfyUI's own check of the origin is gone; ours is not."""
    id = jobs.add("precious")
    (jobs.root / "secret.png").write_bytes(IMAGE + b"secret")
    place = jobs.folder(id).samples / "00003"
    place.mkdir(parents=True)
    (place / "001.png").write_bytes(IMAGE)
    (place / "002.png").symlink_to(jobs.root / "secret.png")
    evil, own = "https://evil.example", "http://127.0.0.1:{}"
    with jobs.serving("--enable-cors-header") as server:
        own = own.format(server.port)
        for prefix in ("", "/api"):
            at = f"{prefix}/pcpo/jobs/{id}"
            for action in ("pause", "continue", "stop", "stop_now", "sample", "resume", "delete"):
                for method in ("GET", "PUT", "DELETE"):
                    status, headers, said = raw(server, method, f"{at}/{action}")
                    assert (status, headers["Allow"]) == (405, "POST") and said["error"]
                assert raw(server, "POST", f"{at}/{action}", Origin=evil)[0] == 403
                assert raw(server, "POST", f"{at}/{action}", Sec_Fetch_Site="cross-site")[0] == 403
            for host in ("evil.example", "127.0.0.1.evil.example:8188"):  # DNS rebinding
                named = {"Host": host, "Origin": f"http://{host}"}
                assert raw(server, "POST", f"{at}/delete", **named)[0] == 403
                assert raw(server, "GET", at, **named)[0] == 403
            for origin in ("null", "http://127.0.0.1:1", own.replace("127.0.0.1", "localhost")):
                assert raw(server, "POST", f"{at}/delete", Origin=origin)[0] == 403
            assert raw(server, "GET", at, Origin=evil)[0] == 403
            assert raw(server, "GET", f"{prefix}/pcpo/jobs", Origin=evil)[0] == 403
            delete = f"{at}/delete"
            assert raw(server, "POST", delete, Content_Type="text/plain")[0] == 415
            assert raw(server, "POST", delete, b"[1]")[0] == 400
            assert raw(server, "POST", delete, b"{" + b" " * 70_000 + b"}")[0] == 413
            for bad in ("0" * 16, id.upper() + "x", "..", "%2e%2e", "..%2f..%2fjobs", "%00"):
                status, _, said = raw(server, "POST", f"{prefix}/pcpo/jobs/{bad}/delete")
                assert status in (404, 405), (bad, status, said)
                assert raw(server, "GET", f"{prefix}/pcpo/jobs/{bad}")[0] in (404, 403, 400), bad
            for image in (
                "3/0",
                "3/2",
                "..%2f..%2f/secret",
                "3/..%2f..%2f..%2fsecret",
                "-1/0",
                "3/0x1",
            ):
                status, _, said = raw(server, "GET", f"{at}/samples/{image}")
                assert status == 404 and b"secret" not in repr(said).encode(), image
            status, headers, said = raw(server, "GET", f"{at}/samples/3/1", Origin=own)
            assert (status, said, headers["Content-Type"]) == (200, IMAGE, "image/png")
            assert raw(server, "GET", at)[2]["state"] == "stopped"
        status, _, said = raw(server, "POST", f"/pcpo/jobs/{id}/pause", Origin=own)
        assert status == 409 and said == {
            "error": "precious is stopped and cannot pause; resume it first"
        }
        status, _, said = raw(server, "POST", f"/pcpo/jobs/{id}/delete", Origin=own)
        assert status == 200 and said["job"]["state"] == "deleted"
        assert raw(server, "GET", "/pcpo/jobs")[2]["jobs"] == []
    assert not jobs.folder(id).root.exists() and (jobs.root / "secret.png").exists()


def test_messages_come_at_most_twice_a_second(jobs):
    id = jobs.add("told")
    with jobs.serving() as server:
        url = f"http://127.0.0.1:{server.port}/ws"
        words = [PYTHON, "-c", LISTENER, url]
        listener = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert listener.stdout is not None and listener.stdout.readline() == "connected\n"
        jobs.post(id, "resume")
        jobs.until(id, "done")
        time.sleep(1.5)
        listener.terminate()
        told = [json.loads(line) for line in listener.communicate()[0].splitlines()]
    states = [jobs[0]["state"] for _, jobs in told]
    assert states[-1] == "done" and "running" in states
    assert all(jobs[0]["id"] == id for _, jobs in told)
    seconds = told[-1][0] - told[0][0]
    assert len(told) <= 2 * seconds + 2


# --- nothing is left behind ----------------------------------------------------------------------


def footprint(pid: int) -> dict[str, int]:
    """Resident memory in kB, threads, open files and children of a process."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    return {
        "rss": int(status["VmRSS"].split()[0]),
        "threads": len(tasks),
        "files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "children": sum(len((task / "children").read_text().split()) for task in tasks),
    }


def at_rest(pid: int) -> dict[str, int]:
    """The footprint once the last worker is gone, or after half a minute."""
    end = time.monotonic() + 30
    time.sleep(3)
    while (now := footprint(pid))["children"] > 0 and time.monotonic() < end:
        time.sleep(0.5)
    return now


@pytest.mark.slow
def test_twenty_cycles_leave_nothing_behind(jobs):
    """A real worker is started and stopped twenty times: takes five minutes or so."""
    id = jobs.add("cycled", iterations=10_000)
    with jobs.serving() as server:
        found = []
        for cycle in range(20):
            jobs.post(id, "resume")
            jobs.until(id, "running", more=jobs.has_lines(id, cycle + 1))
            jobs.post(id, "stop")
            jobs.until(id, "stopped")
            jobs.end_of_worker(id)
            found.append(at_rest(server.process.pid))
        print(*found, sep="\n")
        assert found[-1]["children"] == 0
        assert found[-1]["files"] <= found[1]["files"]
        assert found[-1]["threads"] <= found[1]["threads"] + 4  # of asyncio's own pool
        assert found[-1]["rss"] <= found[1]["rss"] + 8 * 1024
