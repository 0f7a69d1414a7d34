"""The jobs' routes without ComfyUI: what is refused, what is answered."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import comfy_api_fixture  # noqa: F401
import pytest
from comfyui_pcpo.nodes.jobs import handlers, routes
from comfyui_pcpo.nodes.jobs import registry as jobs_module
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job.folder import JobFolder
from comfyui_pcpo.trainers.job.worker import STDERR
from requests_fixture import aiohttp, request  # noqa: F401

PNG = b"\x89PNG\r\n\x1a\n and so on"
CHANGE = handlers.changing(
    lambda at, _: routes.act(routes.registry(), at["id"], at["action"]), "a job"
)


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> JobRegistry:
    """A registry that starts nothing."""
    made = JobRegistry(tmp_path / "jobs", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr(made, "wake", lambda: None)
    monkeypatch.setattr(routes, "registry", lambda: made)
    monkeypatch.setattr(routes, "every_job", lambda: made)
    return made


@pytest.fixture
def job(jobs) -> str:
    return jobs.create(TrainConfig(), "scenes", "cpu")


# --- what is answered ----------------------------------------------------------------------------


def test_jobs_are_shown(jobs, job):
    assert routes.look(jobs, job)[0] == 200
    assert routes.look(jobs, job)[1]["name"] == "scenes"
    status, said = routes.look(jobs, "0" * 16)
    assert status == 404 and "there is no job" in said["error"]


@pytest.mark.parametrize("id", ["..", "../../secret", "%2e%2e", "A" * 16, "0" * 16, ""])
@pytest.mark.parametrize("action", routes.ACTIONS)
def test_ids_are_looked_up_and_no_paths(jobs, job, id, action):
    status, said = routes.act(jobs, id, action)
    assert status == 404 and list(said) == ["error"]
    assert JobFolder(jobs.root / job).is_used()


def test_actions(jobs, job, monkeypatch):
    monkeypatch.setattr(jobs_module, "LAST_S", 0.2)
    status, said = routes.act(jobs, job, "pause")
    assert status == 409 and "queued" in said["error"]
    status, said = routes.act(jobs, job, "stop")
    assert (status, said["job"]) == (200, jobs.summary(job))
    assert jobs.summary(job)["state"] == "stopped"
    assert routes.act(jobs, job, "resume")[1]["job"]["state"] == "queued"
    assert routes.act(jobs, job, "explode")[0] == 404
    routes.act(jobs, job, "stop")
    with jobs.folder(job).hold():
        status, said = routes.act(jobs, job, "delete")
        assert status == 409 and "about to end" in said["error"]
    assert routes.act(jobs, job, "delete")[1]["job"]["state"] == "deleted"
    assert jobs.jobs() == []


def test_a_job_is_deleted_once_its_process_has_ended(jobs, job):
    """A worker says "stopped" a while before its process is gone, here another server's."""
    routes.act(jobs, job, "stop")
    with ThreadPoolExecutor() as pool:
        with jobs.folder(job).hold():
            asked = pool.submit(routes.act, jobs, job, "delete")
            time.sleep(0.5)
            assert not asked.done()
        assert asked.result(5)[0] == 200
    assert jobs.jobs() == []


def test_samples_are_named_by_numbers(jobs, job):
    place = jobs.folder(job).samples / "00010"
    place.mkdir(parents=True)
    (place / "002.png").write_bytes(PNG)
    (jobs.root / "000.png").write_bytes(PNG)
    assert routes.sample(jobs, job, "10", "2") == PNG
    for at in (("10", "3"), ("..", "000"), ("10", "../2"), ("-1", "0"), ("٣", "2"), ("", "")):
        found = routes.sample(jobs, job, *at)
        assert not isinstance(found, bytes) and found[0] == 404
    assert routes.sample(jobs, "..", "10", "2")[0] == 404


@pytest.mark.parametrize("at", ["000.png", "00010", "samples", "job", "circle", "outside"])
def test_no_link_is_followed_to_a_sample(jobs, job, tmp_path, at):
    root = jobs.root / job
    place = root / "samples" / "00010"
    place.mkdir(parents=True)
    (place / "000.png").write_bytes(PNG)
    assert routes.sample(jobs, job, "10", "0") == PNG
    linked = {"000.png": place / "000.png", "00010": place, "samples": root / "samples",
              "job": root}.get(at)  # fmt: skip
    if linked is not None:
        moved = linked.rename(tmp_path / "moved")
        linked.symlink_to(moved, target_is_directory=moved.is_dir())
    else:
        (place / "000.png").unlink()
        secret = tmp_path / "secret.txt"
        secret.write_text("secret")
        (place / "000.png").symlink_to(place / "000.png" if at == "circle" else secret)
    assert routes.sample(jobs, job, "10", "0")[0] == 404


@pytest.mark.parametrize("kind", ["text", "folder", "pipe", "empty"])
def test_what_is_no_png_is_no_sample(jobs, job, kind):
    file = jobs.folder(job).samples / "00010" / "000.png"
    file.parent.mkdir(parents=True)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(b"" if kind == "empty" else b"<html>")
    assert routes.sample(jobs, job, "10", "0")[0] == 404


def test_a_log_that_is_a_link_is_not_shown(jobs, job, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret\n")
    folder = jobs.folder(job)
    folder.status("failed")
    for file in (folder.log, folder.root / STDERR):
        file.symlink_to(secret)
    assert jobs.job(job)["log"] == []
    folder.log.unlink()
    folder.log.write_text("its own\n")
    assert jobs.job(job)["log"] == ["its own"]


def test_of_two_answers_that_of_the_larger_number_was_made_later(jobs, job, tmp_path):
    stamps = [jobs.answer()["at"], jobs.answer(job)["at"], jobs.job(job)["at"],
              routes.act(jobs, job, "stop")[1]["at"], routes.act(jobs, job, "delete")[1]["at"],
              jobs.answer()["at"], JobRegistry(tmp_path / "jobs").answer()["at"]]  # fmt: skip
    assert stamps == sorted(set(stamps))
    assert stamps[-1] < 2**53  # as JavaScript counts


# --- the handlers --------------------------------------------------------------------------------


def change(*given: Any, **named: Any) -> tuple[int, dict[str, Any], dict[str, str]]:
    return asyncio.run(CHANGE(request(*given, **named)))


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH"])
def test_only_post_changes(jobs, job, method):
    status, said, headers = change(method, id=job, action="delete")
    assert (status, headers) == (405, {"Allow": "POST"}) and "POST" in said["error"]
    assert jobs.summary(job)["state"] == "queued"


def test_a_post_of_our_own_changes(jobs, job):
    status, said, _ = change("POST", id=job, action="stop")
    assert status == 200 and said["job"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("status", "given"),
    [
        (403, {"headers": {"Origin": "https://evil.example"}}),
        (403, {"headers": {"ORIGIN": "null"}}),
        (403, {"headers": {"Sec-Fetch-Site": "cross-site"}}),
        (403, {"headers": {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}}),
        (415, {"headers": {"Content-Type": "text/plain"}}),
        (415, {"headers": {"Content-Type": "application/x-www-form-urlencoded"}}),
        (415, {"headers": {"Content-Type": None}}),
        (400, {"body": [b"[]"]}),
        (400, {"body": [b"{"]}),
        (400, {"body": [b"\xff\xfe"]}),
        (400, {"body": [b"[" * 60_000]}),
        (413, {"content_length": 70_000}),
        (413, {"body": [b" " * 30_000] * 3}),
        (404, {"id": "../x"}),
        (404, {"action": "destroy"}),
    ],
)
def test_what_is_refused(jobs, job, status, given):
    answer = change("POST", **{"id": job, "action": "stop", **given})
    assert answer[0] == status and list(answer[1]) == ["error"]
    assert jobs.summary(job)["state"] == "queued"


def test_of_a_large_body_little_is_read(jobs, job):
    asked = request("POST", [b" " * 8192] * 1000, id=job, action="stop")
    assert asyncio.run(CHANGE(asked))[0] == 413
    assert asked.content.read <= handlers.MAX_BODY + 8192


def test_reading(jobs, job):
    handler = handlers.reading(lambda at: routes.look(routes.registry(), at["id"]))
    status, said, _ = asyncio.run(handler(request("GET", id=job)))
    assert status == 200 and json.dumps(said, allow_nan=False)
    evil = request("GET", id=job, headers={"Origin": "https://evil.example"})
    assert asyncio.run(handler(evil))[0] == 403


def test_an_image_is_sent_once(jobs):
    handler = handlers.reading(lambda _: PNG)
    status, body, headers = asyncio.run(handler(request("GET")))
    assert (status, body, headers["Content-Type"]) == (200, PNG, "image/png")
    again = request("GET", headers={"If-None-Match": headers["ETag"]})
    assert asyncio.run(handler(again))[:2] == (304, None)


def test_nothing_is_registered_without_a_server(jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "server", types.ModuleType("server"))
    routes.register()
