"""The panel's downloads: who may begin one, of what, and what is told of it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys
import time
import types

import comfy_api_fixture  # noqa: F401
import pytest
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.jobs import access
from comfyui_pcpo.nodes.rewards import downloads, routes
from comfyui_pcpo.nodes.rewards.make import explain_errors
from comfyui_pcpo.pcpo.pretrained import fetch
from comfyui_pcpo.pcpo.pretrained.catalogue import WEIGHTS
from comfyui_pcpo.pcpo.pretrained.find import MissingWeights
from requests_fixture import aiohttp, request  # noqa: F401
from source_fixture import Source

DATA = b"the weights of a head" * 50_000
KEY = "aesthetic_head"


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """ComfyUI's models folder, without a file; the catalogue's head is `DATA`."""
    paths = sys.modules["folder_paths"]
    monkeypatch.setattr(paths, "models_dir", str(tmp_path), raising=False)
    monkeypatch.setattr(
        paths, "get_folder_paths", lambda name: [str(tmp_path / name)], raising=False
    )
    monkeypatch.setattr(paths, "add_model_folder_path", lambda *_: None, raising=False)
    monkeypatch.setattr(downloads, "_downloads", {})
    monkeypatch.setattr(downloads, "find", found_in(tmp_path))
    monkeypatch.delenv(access.DOWNLOADS, raising=False)
    monkeypatch.setattr(access, "_args", lambda: types.SimpleNamespace(listen="127.0.0.1"))
    head = dataclasses.replace(
        WEIGHTS[KEY], size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest()
    )
    monkeypatch.setitem(WEIGHTS, KEY, head)
    return tmp_path


def found_in(folder):
    """The search for weights, which takes `DATA` for the head."""

    def find(key, folders):
        file = folder / WEIGHTS[key].folder / WEIGHTS[key].name
        if file.is_file() and file.read_bytes() == DATA:
            return file
        raise MissingWeights("missing", key)

    return find


@pytest.fixture
def source(monkeypatch):
    """The server that every file comes from."""
    with Source(DATA) as started:
        monkeypatch.setattr(fetch, "source_of", lambda file: started.url)
        monkeypatch.setattr(fetch, "BLOCK", 1 << 16)
        yield started
        for each in downloads._downloads.values():
            each.stop.set()
            each.thread.join(5)


def now(key=KEY):
    return next(file for file in downloads.listing()["files"] if file["key"] == key)


def until(is_true):
    end = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


def place(models, key=KEY):
    return models / WEIGHTS[key].folder / WEIGHTS[key].name


def test_a_missing_file_is_downloaded_into_its_folder(models, source):
    assert now()["state"] == "missing" and now()["rewards"] == ["aesthetic"]
    assert now()["refusal"] is None
    assert routes.act(KEY, "download") == (200, {"key": KEY})
    until(lambda: now()["state"] == "there")
    assert place(models).read_bytes() == DATA
    assert routes.act(KEY, "download") == (409, {"error": "It is there already."})


def test_a_download_tells_how_far_it_is_and_can_be_cancelled_and_gone_on_with(models, source):
    source.pause = 0.1
    routes.act(KEY, "download")
    until(lambda: now()["done"] > 0)
    assert now()["state"] == "loading" and now()["size"] == len(DATA)
    assert routes.act(KEY, "download") == (409, {"error": "It is being downloaded already."})
    assert routes.act(KEY, "cancel")[0] == 200
    until(lambda: now()["state"] == "missing")
    assert 0 < now()["done"] < len(DATA) and not place(models).exists()
    assert routes.act(KEY, "cancel") == (409, {"error": "It is not being downloaded."})
    source.pause = 0.0
    routes.act(KEY, "download")
    until(lambda: now()["state"] == "there")
    assert source.asked[0] is None and source.asked[1].startswith("bytes=")


def test_one_file_is_loaded_at_a_time(models, source):
    source.pause = 0.1
    routes.act(KEY, "download")
    until(lambda: now()["state"] == "loading")
    assert routes.act("pick_score", "download")[0] == 200
    time.sleep(0.3)
    assert now("pick_score")["state"] == "waiting" and len(source.asked) == 1
    assert routes.act("pick_score", "cancel")[0] == 200
    until(lambda: now("pick_score")["state"] == "missing")
    assert now()["state"] == "loading"


def test_why_a_download_failed_is_told(source):
    source.data = DATA[::-1]
    routes.act(KEY, "download")
    until(lambda: now()["state"] == "failed")
    assert now()["message"].startswith("What arrived is another file") and now()["done"] == 0
    source.data = DATA
    routes.act(KEY, "download")
    until(lambda: now()["state"] == "there")


def test_another_file_in_the_place_is_told_and_left(models, source):
    place(models).parent.mkdir(parents=True)
    place(models).write_bytes(b"mine")
    assert now()["state"] == "wrong"
    assert hashlib.sha256(b"mine").hexdigest() in now()["message"]
    status, told = routes.act(KEY, "download")
    assert status == 409 and "Move it away" in told["error"]
    assert place(models).read_bytes() == b"mine" and not source.asked


def test_a_file_without_a_checksum_is_not_offered(source):
    assert now("hps_v2_1")["refusal"] == downloads.UNKNOWN_SUM
    assert routes.act("hps_v2_1", "download") == (409, {"error": downloads.UNKNOWN_SUM})
    assert not source.asked


@pytest.mark.parametrize("key", ["scene", "../../etc", "http://127.0.0.1/x", "fid", "alexnet"])
def test_nothing_but_an_entry_for_rewards_is_downloaded(key, source):
    assert routes.act(key, "download")[0] == 404
    assert routes.act(key, "cancel")[0] == 404
    assert not source.asked


def test_other_actions_are_refused():
    status, told = routes.act(KEY, "delete")
    assert status == 404 and "download, cancel" in told["error"]


@pytest.mark.parametrize(
    ("listen", "shared", "switch", "may"),
    [
        ("127.0.0.1", False, None, True),
        ("127.0.0.1,::1", False, None, True),
        ("127.0.0.1", False, "off", False),
        ("127.0.0.1", False, "no", False),
        ("0.0.0.0", False, None, False),
        ("127.0.0.1,0.0.0.0", False, None, False),
        ("0.0.0.0", False, "on", True),
        ("127.0.0.1", True, None, False),
        ("127.0.0.1", True, "on", True),
    ],
)
def test_who_may_download(listen, shared, switch, may, monkeypatch, source):
    given = types.SimpleNamespace(listen=listen, multi_user=shared)
    monkeypatch.setattr(access, "_args", lambda: given)
    if switch is not None:
        monkeypatch.setenv(access.DOWNLOADS, switch)
    told = downloads.listing()["off"]
    assert (told is None) == may
    status, answer = routes.act(KEY, "download")
    assert status == (200 if may else 403)
    if not may:
        assert answer == {"error": told} and "PCPO_DOWNLOADS" in told and not source.asked


def test_other_sites_and_other_methods_are_refused(monkeypatch, source):
    made = {}
    add = lambda *path: lambda handler: made.setdefault(path[-1], handler)  # noqa: E731
    server = types.SimpleNamespace(routes=types.SimpleNamespace(get=add, route=add))
    monkeypatch.setattr(access, "server", lambda: server)
    routes.register()
    change = made["/pcpo/weights/{key}/{action}"]

    def answer(method, **given):
        at = {"key": KEY, "action": "download"}
        return asyncio.run(change(request(method, **at, **given)))

    foreign = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert answer("POST", headers=foreign)[0] == 403
    assert answer("GET")[0] == 405
    assert answer("POST", headers={"Content-Type": "text/plain"})[0] == 415
    assert not source.asked
    assert answer("POST")[0] == 200
    read = asyncio.run(made["/pcpo/weights"](request("GET")))
    assert read[0] == 200 and json.dumps(read[1])


def test_two_entries_that_are_one_file_are_shown_once():
    names = [(file["folder"], file["name"]) for file in downloads.listing()["files"]]
    assert len(names) == len(set(names))
    assert set(now("clip_l_vision")["rewards"]) >= {"aesthetic"}


@pytest.mark.parametrize(("key", "hinted"), [(KEY, True), ("hps_v2_1", False), (None, False)])
def test_the_error_of_a_node_names_the_download(key, hinted, monkeypatch):
    def told():
        with pytest.raises(NodeError) as error, explain_errors("aesthetic"):
            raise MissingWeights("the head is missing", key)
        return str(error.value)

    assert ("press Download on the page Weights of the PCPO tab" in told()) == hinted
    monkeypatch.setenv(access.DOWNLOADS, "off")
    assert told() == "the head is missing"
