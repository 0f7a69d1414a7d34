"""Whose jobs are whose in real ComfyUI: with --multi-user, and where others reach the server.

What it needs is in comfyui_fixture.py.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from comfyui_fixture import PYTHON, needs_host
from comfyui_pcpo.tests.comfyui.test_comfyui_background import node, parts, training
from comfyui_pcpo.tests.comfyui.test_comfyui_jobs import IMAGE, LISTENER, Jobs, raw
from comfyui_server_fixture import Server

pytestmark = needs_host
ANN, BOB = "ann_1", "bob_2"


class User:
    """What one user does; None does not say who they are."""

    def __init__(self, server: Server, name: str | None) -> None:
        self.server, self.name = server, name

    def request(self, method: str, path: str, content: Any = None, **more: str) -> Any:
        headers = {"Comfy-User": self.name} if self.name else {}
        body = json.dumps({} if content is None else content).encode()
        return raw(self.server, method, path, body, **headers, **more)

    def jobs(self) -> list[dict[str, Any]]:
        return self.request("GET", "/pcpo/jobs")[2]["jobs"]

    def until(self, id: str, *states: str) -> None:
        end = time.monotonic() + 300
        while (job := self.request("GET", f"/pcpo/jobs/{id}")[2])["state"] not in states:
            assert time.monotonic() < end and job["state"] != "failed", job
            time.sleep(0.3)

    def choices(self, kind: str) -> list[str]:
        found = self.request("GET", f"/object_info/{kind}")[2][kind]["input"]["required"]["job"]
        return found[1]["options"] if isinstance(found[1], dict) else found[0]

    def run(self, graph: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Queue a graph and wait for its end; the history's entry."""
        sent = {"prompt": graph, "client_id": f"page of {self.name}", **more}
        status, _, said = self.request("POST", "/prompt", sent)
        assert status == 200, said
        end = time.monotonic() + 200
        while not (found := self.server.get(f"/history/{said['prompt_id']}")):
            assert time.monotonic() < end
            time.sleep(0.2)
        return found[said["prompt_id"]]


def failure(history: dict[str, Any]) -> str:
    """Why a prompt failed."""
    (said,) = [body for kind, body in history["status"]["messages"] if kind == "execution_error"]
    return said["exception_message"]


def follow(server: Server) -> subprocess.Popen[str]:
    """A page that listens."""
    url = f"http://127.0.0.1:{server.port}/ws"
    listener = subprocess.Popen([PYTHON, "-c", LISTENER, url], stdout=subprocess.PIPE, text=True)
    assert listener.stdout is not None and listener.stdout.readline() == "connected\n"
    return listener


@pytest.fixture
def jobs(tmp_path):
    users = tmp_path / "user" / "users.json"
    users.parent.mkdir(parents=True)
    users.write_text(json.dumps({ANN: "ann", BOB: "bob"}))
    return Jobs(tmp_path)


def load(job: str, **inputs: Any) -> dict[str, Any]:
    loader = node(
        "PCPOLoadJobLora", model=["load", 0], job=job, which="latest", iteration=1, strength=1.0,
        **inputs,
    )  # fmt: skip
    return parts() | {"lora": loader, "show": node("PreviewAny", source=["lora", 0])}


def export(job: str, **inputs: Any) -> dict[str, Any]:
    return {
        "file": node(
            "PCPOExportLora", job=job, which="latest", iteration=1, name="taken", kind="LoRA",
            dtype="float32", folder="output", **inputs,
        )
    }  # fmt: skip


def test_users_have_jobs_of_their_own(jobs, tmp_path):
    """One trains; the other sees, loads, exports, changes and hears nothing of it."""
    old = jobs.add("from before")
    with jobs.serving("--multi-user") as server:
        ann, bob, eve = User(server, ANN), User(server, BOB), User(server, None)
        listener = follow(server)
        assert ann.run(training("anns_lora"))["status"]["status_str"] == "success"
        (job,) = ann.jobs()
        id = job["id"]
        assert jobs.folder(id).read("job.json")["user"] == ANN
        ann.until(id, "done")

        assert bob.jobs() == [] and eve.request("GET", "/pcpo/jobs")[0] == 403
        for other in (bob, eve, User(server, "__pcpo"), User(server, "nobody_3")):
            for action in ("pause", "continue", "stop", "stop_now", "sample", "resume", "delete"):
                for each in (id, old):
                    status = other.request("POST", f"/pcpo/jobs/{each}/{action}")[0]
                    assert status in (403, 404), (other.name, action)
            assert other.request("GET", f"/pcpo/jobs/{id}")[0] in (403, 404)
            assert other.request("GET", f"/pcpo/jobs/{id}/samples/0/0")[0] in (403, 404)
            query = f"?user={other.name}" if other.name else ""
            assert eve.request("GET", f"/pcpo/jobs/{id}/samples/0/0{query}")[0] in (403, 404)
        status, _, image = eve.request("GET", f"/pcpo/jobs/{id}/samples/0/0?user={ANN}")
        assert status == 200 and image.startswith(IMAGE)  # as the page of ann asks for it

        for kind in ("PCPOJob", "PCPOLoadJobLora", "PCPOExportLora"):
            assert ann.choices(kind) == ["newest job", "anns_lora"]
            assert bob.choices(kind) == eve.choices(kind) == ["newest job"]
        assert ann.run(load("anns_lora"))["status"]["status_str"] == "success"
        literal = {"from_job": {"id": id}}
        spoofed = {"extra_data": {"pcpo_user": ANN}}
        for graph in (load("anns_lora"), load("newest job"), load(id), load("x", **literal),
                      export(id), export("newest job", **literal),
                      {"job": node("PCPOJob", job="newest job")},
                      {"job": node("PCPOJob", job="x", **literal)},
                      {"job": node("PCPOWaitForJob", job={"id": id}),
                       "show": node("PreviewAny", source=["job", 0])}):  # fmt: skip
            for other in (bob, eve):
                assert "there is no job" in failure(other.run(graph, **spoofed))
        assert not list((tmp_path / "output").rglob("taken*"))

        assert bob.run(training("bobs_lora"))["status"]["status_str"] == "success"
        assert [job["name"] for job in bob.jobs()] == ["bobs_lora"]
        assert [job["name"] for job in ann.jobs()] == ["anns_lora"]
        said = failure(eve.run(training("of nobody"), **spoofed))
        assert "--multi-user" in said and "choose a user" in said

        listener.terminate()
        told = [json.loads(line)[1] for line in listener.communicate()[0].splitlines()]
        assert told and set(map(str, told)) == {"None"}
        seen = json.dumps(ann.request("GET", f"/pcpo/jobs/{id}")[2])
        assert str(tmp_path) not in seen and str(Path(__file__).parents[2]) not in seen
        (bobs,) = bob.jobs()
        bob.request("POST", f"/pcpo/jobs/{bobs['id']}/stop")
        bob.until(bobs["id"], "done", "stopped")
        assert ann.request("POST", f"/pcpo/jobs/{id}/delete")[0] == 200
        assert ann.jobs() == []
    with jobs.serving() as server:  # one user again: all jobs are theirs
        names = {job["name"] for job in server.get("/pcpo/jobs")["jobs"]}
        assert names == {"from before", "bobs_lora"}


@pytest.mark.parametrize("listen", ["0.0.0.0", "127.0.0.1"])
def test_names_of_a_server(jobs, listen):
    id = jobs.add("precious")
    with jobs.serving("--listen", listen) as server:
        named = {"Host": "art.example", "Origin": "http://art.example"}
        status, _, said = raw(server, "GET", "/pcpo/jobs", **named)
        if listen == "0.0.0.0":
            assert status == 200 and [job["id"] for job in said["jobs"]] == [id]
        else:
            assert status == 403 and "PCPO_ALLOWED_HOSTS" in said["error"]
            with urllib.request.urlopen(f"http://localhost:{server.port}/pcpo/jobs") as answer:
                assert json.load(answer)["jobs"][0]["id"] == id
