"""Who may see and change jobs: pages, names of the server, users."""

from __future__ import annotations

import asyncio
import contextvars
import json
import sys
import types
from functools import partial
from typing import Any

import comfy_api_fixture  # noqa: F401
import pytest
from comfyui_pcpo.nodes.errors import NodeError
from comfyui_pcpo.nodes.jobs import access, handlers, of_comfyui, routes
from comfyui_pcpo.nodes.jobs.of_comfyui import comfyui, registry
from comfyui_pcpo.nodes.jobs.registry import JobRegistry, UnknownJob
from comfyui_pcpo.trainers.config.train_config import TrainConfig

# --- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:8188", "127.0.0.1:8188"),
        ("http://LOCALHOST:8188", "localhost:8188"),
        ("https://art.example", "art.example"),
        ("https://art.example", "art.example:443"),
        ("http://art.example:80", "art.example"),
        ("http://[::1]:8188", "[::1]:8188"),
        (None, "127.0.0.1:8188"),
    ],
)
def test_own_pages_may_ask(origin, host):
    headers = {"host": host} | ({"origin": origin} if origin else {})
    assert access.foreign(headers | {"sec-fetch-site": "same-origin"}) is None
    assert access.foreign(headers) is None


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://127.0.0.1:3000",
        "http://127.0.0.1",
        "https://127.0.0.1:8188.evil.example",
        "http://localhost:8188",
        "null",
        "",
        "http://127.0.0.1:port",
        "http://[::1",
        "file://",
    ],
)
def test_other_sites_may_not(origin):
    assert access.foreign({"host": "127.0.0.1:8188", "origin": origin})


def test_what_the_browser_calls_cross_site_may_not():
    assert access.foreign({"host": "127.0.0.1:8188", "sec-fetch-site": "cross-site"})


# --- names of the server -------------------------------------------------------------------------


@pytest.fixture
def listens(monkeypatch):
    """What ComfyUI was started with."""

    def set_to(value: str | None, multi_user: bool = False) -> None:
        module = types.ModuleType("comfy.cli_args")
        if value is not None:
            module.args = types.SimpleNamespace(listen=value, multi_user=multi_user)
        monkeypatch.setitem(sys.modules, "comfy.cli_args", module)

    monkeypatch.delenv(access.HOSTS, raising=False)
    return set_to


LOOPBACK = [None, "127.0.0.1", "127.0.0.1,::1", "::1", "[::1]", "localhost", "127.2.2.2,127.3.3.3"]
OURS = ["127.0.0.1:8188", "127.0.0.1", "localhost:8188", "LOCALHOST", "localhost.:8188",
        "x.localhost:1", "[::1]:8188", "127.8.8.8"]  # fmt: skip
OTHERS = ["evil.example:8188", "127.0.0.1.evil.example", "localhost.evil.example", "evillocalhost",
          "192.168.1.5:8188", "0.0.0.0:8188", "[fe80::1]", "[::1", "127.0.0.1:port@evil", "",
          "2130706433"]  # fmt: skip


@pytest.mark.parametrize("listen", LOOPBACK)
def test_a_server_of_this_machine_has_its_names(listens, listen):
    listens(listen)
    assert [host for host in OURS if access.wrong_host({"host": host})] == []
    assert [host for host in OTHERS if not access.wrong_host({"host": host})] == []
    assert access.wrong_host({})


@pytest.mark.parametrize("listen", ["0.0.0.0,::", "0.0.0.0", "192.168.1.5", "127.0.0.1,10.0.0.1"])
def test_a_server_that_others_reach_has_names_that_we_do_not_know(listens, listen):
    listens(listen)
    assert access.wrong_host({"host": "art.example"}) is None


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0,::"])
def test_an_owner_names_more(listens, monkeypatch, listen):
    """For a proxy before it; and then every name must be known."""
    listens(listen)
    monkeypatch.setenv(access.HOSTS, "art.example, 192.168.1.5 ,[::2]")
    for host in ("ART.example", "art.example:443", "192.168.1.5:8188", "[::2]:1", "localhost"):
        assert access.wrong_host({"host": host}) is None
    said = access.wrong_host({"host": "evil.example"})
    assert said and access.HOSTS in said and "evil.example" in said


# --- users ---------------------------------------------------------------------------------------


class Manager:
    """As ComfyUI's."""

    users = ("ann", "bob")

    def get_request_user_id(self, request: Any) -> str:
        user = request.headers.get("comfy-user", "default")
        if user.startswith("__") or user not in self.users:
            raise KeyError("Unknown user: " + user)
        return user


class Comfy:
    """A server with several users: its running prompts, and what it was given."""

    def __init__(self) -> None:
        self.running: list[Any] = []
        self.user_manager = Manager()
        self.prompt_queue = self
        self.app = types.SimpleNamespace(middlewares=[])
        self.handlers: list[Any] = []
        self.add_on_prompt_handler = self.handlers.append
        self.sent: list[Any] = []
        self.client_id: str | None = None

    def get_current_queue_volatile(self):
        return self.running, []

    def send_sync(self, *said: Any) -> None:
        self.sent.append(said)

    def send_progress_text(self, *said: Any) -> None:
        self.sent.append(said)


@pytest.fixture
def comfy(listens, monkeypatch) -> Comfy:
    listens("127.0.0.1", multi_user=True)
    made = Comfy()
    module = types.ModuleType("server")
    module.PromptServer = types.SimpleNamespace(instance=made)
    monkeypatch.setitem(sys.modules, "server", module)
    web = types.ModuleType("aiohttp.web")
    web.middleware = lambda handler: handler
    web.json_response = lambda value, status, headers: (status, value)
    aiohttp = types.ModuleType("aiohttp")
    aiohttp.web = web
    monkeypatch.setitem(sys.modules, "aiohttp", aiohttp)
    monkeypatch.setitem(sys.modules, "aiohttp.web", web)
    return made


@pytest.fixture
def everyone(tmp_path, monkeypatch) -> JobRegistry:
    made = JobRegistry(tmp_path / "jobs", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr(made, "wake", lambda: None)
    monkeypatch.setattr(of_comfyui, "_registries", [made])
    return made


def request(by: str | None = None, method: str = "GET", **query: str) -> Any:
    headers = {"host": "127.0.0.1:8188"} | ({"comfy-user": by} if by else {})
    return types.SimpleNamespace(headers=headers, method=method, query=query, match_info={})


def asked_by(comfy: Comfy, asked: Any, answer: Any) -> Any:
    """What a handler gives within a request."""
    access.watch(comfy)
    remember = comfy.app.middlewares[-1]

    async def handler(_: Any) -> Any:
        return answer()

    return asyncio.run(remember(asked, handler))


def as_user(user: str | None, run: Any) -> Any:
    """What something gives while a request of a user is answered."""
    context = contextvars.copy_context()
    context.run(access._request.set, request(user))
    return context.run(run)


def add(user: str | None, name: str) -> str:
    return as_user(user, lambda: registry().create(TrainConfig(), name, "cpu"))


@pytest.mark.parametrize(
    ("asked", "user"),
    [
        (request("ann"), "ann"),
        (request(user="bob"), "bob"),
        (request("ann", user="bob"), "ann"),  # a proxy's header goes before what a page says
        (request(None, "POST", user="bob"), None),
        (request("__pcpo"), None),
        (request("eve"), None),
        (request(user="__pcpo"), None),
        (request(), None),
    ],
)
def test_who_asks(comfy, asked, user):
    assert asked_by(comfy, asked, access.current_user) == user
    assert access.current_user() is None  # after it


def test_a_prompt_keeps_who_queued_it(comfy):
    for given in ({}, {"extra_data": {"client_id": "x", access.USER: "bob"}}, {"extra_data": None}):
        sent = asked_by(comfy, request("ann"), lambda given=given: access.sign(given))
        assert sent["extra_data"][access.USER] == "ann"
        unknown = asked_by(comfy, request("eve"), lambda given=given: access.sign(given))
        assert unknown["extra_data"][access.USER] is None
    assert comfy.handlers and set(comfy.handlers) == {access.sign}


def test_what_runs_is_of_whoever_queued_it(comfy):
    assert access.current_user() is None
    ann = (0, "id", {}, {access.USER: "ann"}, [], {})
    comfy.running = [ann]
    assert access.current_user() == "ann"
    assert as_user("bob", access.current_user) == "bob"  # a request that comes meanwhile
    assert as_user("eve", access.current_user) is None
    for running in ([ann, ann], [(0, "id", {}, {}, [], {})]):
        comfy.running = running
        assert access.current_user() is None


def test_with_one_user_all_jobs_are_there(listens, everyone):
    listens("127.0.0.1")
    ids = [everyone.create(TrainConfig(), "old", "cpu"),
           everyone.create(TrainConfig(), "ann's", "cpu", user="ann")]  # fmt: skip
    assert registry() is everyone
    assert {job["id"] for job in everyone.jobs()} == set(ids)
    access.admit()


def test_a_user_has_jobs_of_their_own(comfy, everyone):
    ann, old = add("ann", "a"), everyone.create(TrainConfig(), "old", "cpu")
    bob = add("bob", "b")
    for user, own in (("ann", [ann]), ("bob", [bob]), (None, []), ("eve", [])):
        view = as_user(user, registry)
        assert [job["id"] for job in view.jobs()] == own
        assert [job["id"] for job in view.answer()["jobs"]] == own
        for id in {ann, bob, old} - set(own):
            for call in (view.summary, view.job, view.folder, view.resume, view.delete,
                         view.answer, partial(view.ask, request="stop")):  # fmt: skip
                with pytest.raises(UnknownJob):
                    call(id)
            assert routes.sample(view, id, "0", "0")[0] == 404
            assert routes.act(view, id, "delete")[0] == 404
        for id in own:
            assert view.job(id)["folder"] is None
    assert {job["id"] for job in everyone.jobs()} == {ann, bob, old}
    view = as_user("bob", registry)
    view.ask(bob, "stop")
    view.resume(bob)
    view.ask(bob, "stop")
    view.delete(bob)
    assert view.jobs() == []


def test_what_a_view_does_not_have_is_nobody_s(everyone):
    public = {name for name in vars(JobRegistry) if name[0] != "_"}
    assert public - {"wake", "close", "stamp", *vars(access.UserJobs)} == {
        "free_name",  # of models/loras, which all users share
        "waited_for",
    }


@pytest.mark.parametrize("user", [None, "eve"])
def test_nobody_starts_nothing(comfy, everyone, user):
    with pytest.raises(NodeError, match="multi-user"):
        add(user, "x")
    with pytest.raises(NodeError, match="multi-user"):
        as_user(user, access.admit)
    as_user("ann", access.admit)
    assert everyone.jobs() == []


def test_routes_answer_each_user_alone(comfy, everyone):
    ann = add("ann", "a")
    listed = handlers.reading(lambda _: (200, registry().answer()))
    opened = handlers.reading(lambda _: routes.look(registry(), ann))

    def get(handler: Any, asked: Any) -> Any:
        access.watch(comfy)
        return asyncio.run(comfy.app.middlewares[-1](asked, handler))

    assert [job["id"] for job in get(listed, request("ann"))[1]["jobs"]] == [ann]
    assert get(listed, request("bob"))[1]["jobs"] == []
    assert get(opened, request("ann"))[0] == 200
    assert get(opened, request("bob"))[0] == 404
    for asked in (request(), request("eve"), request("__pcpo")):
        status, said = get(listed, asked)
        assert status == 403 and "multi-user" in said["error"]


def test_a_broadcast_tells_nobody_about_another(comfy, everyone, listens, monkeypatch):
    paths = types.ModuleType("folder_paths")
    paths.get_system_user_directory = lambda name: "/x"
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    notify = comfyui()["notify"]
    notify([{"id": "x", "name": "of ann"}])
    assert comfy.sent == [("pcpo.jobs", {"jobs": None})]
    listens("127.0.0.1")
    notify([{"id": "x"}])
    assert comfy.sent[-1][1]["jobs"] == [{"id": "x"}] and comfy.sent[-1][1]["at"] > 0


def test_texts_on_nodes_go_to_whoever_queued_them(comfy, listens):
    from comfyui_pcpo.nodes.show import show_text

    show_text("job of ann", "1")
    assert comfy.sent == []  # no page queued it, and all would read it
    comfy.client_id = "page of ann"
    show_text("job of ann", "1")
    listens("127.0.0.1")
    comfy.client_id = None
    show_text("job\nof all", "1")  # two spaces: Markdown's end of a line, in Nodes 2.0
    assert comfy.sent == [("job of ann", "1", "page of ann"), ("job  \nof all", "1", None)]


def test_no_path_of_the_server_reaches_a_user(comfy, everyone, tmp_path):
    place = tmp_path / "with space"
    config = TrainConfig.model_validate({"run": {"publish": str(place / "my lora.safetensors")}})
    id = as_user("ann", lambda: registry().create(config, "a", "cpu"))
    folder = everyone.folder(id)
    folder.status("failed", message=f"{folder.root} cannot be written to (/etc/x/y.txt)")
    folder.log.write_text(f'File "{tmp_path}/x.py", line 3\nsaved to {tmp_path}/b.png\n')
    seen = as_user("ann", lambda: handlers._json(routes.look(registry(), id)))[1]
    assert str(tmp_path) not in json.dumps(seen) and "/etc" not in json.dumps(seen)
    assert seen["publish"] == "my lora.safetensors"
    assert seen["log"] == ['File "x.py", line 3', "saved to b.png"]
    windows = r"C:\the models\x.png", r"see D:\a\b.png and http://h/a/b, 3/4, a/b"
    assert access.public(list(windows)) == ["x.png", "see b.png and http://h/a/b, 3/4, a/b"]
