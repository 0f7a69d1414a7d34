"""The tastes' routes without ComfyUI: what is answered, what is refused, what survives."""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import comfy_api_fixture  # noqa: F401
import pytest
from comfyui_pcpo.nodes.jobs import access
from comfyui_pcpo.nodes.jobs.registry import JobRegistry
from comfyui_pcpo.nodes.taste import desks, places, routes
from comfyui_pcpo.trainers.config.train_config import TrainConfig
from comfyui_pcpo.trainers.job.files import write_json
from comfyui_pcpo.trainers.taste.store import Store
from requests_fixture import aiohttp, request  # noqa: F401
from taste_fixture import pictures, voted


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of the tastes of a ComfyUI."""
    paths = sys.modules["folder_paths"]
    monkeypatch.setattr(
        paths, "get_system_user_directory", lambda name: str(tmp_path / f"__{name}")
    )
    monkeypatch.setattr(desks, "_desks", {})
    return tmp_path / "__pcpo" / "tastes"


@pytest.fixture
def warm():
    """A taste with pictures to choose from."""
    store = places.new_taste("warm")
    store.offer(pictures(30), ["a hill"] * 30, "x")
    return store


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job's folder, in a registry that starts nothing."""
    jobs = JobRegistry(tmp_path / "jobs", lambda *_, **__: pytest.fail("a worker was started"))
    monkeypatch.setattr(jobs, "wake", lambda: None)
    monkeypatch.setattr(routes, "registry", lambda: jobs)
    return jobs.folder(jobs.create(TrainConfig(), "scenes", "cpu"))


def sampled(folder, iteration, prompts=4):
    """Samples of a job at an iteration."""
    place = folder.samples / f"{iteration:05}"
    place.mkdir(parents=True)
    for index, picture in enumerate(pictures(prompts, seed=iteration)):
        picture.save(place / f"{index:03}.png")
    scores = [{"prompt": f"prompt {i}", "reward": 0.5} for i in range(prompts)]
    write_json(place / "scores.json", scores)


def done(answer):
    assert answer[0] == 200, answer
    return answer[1]


def refused(answer):
    assert answer[0] in (404, 409) and list(answer[1]) == ["error"], answer
    return answer


# --- what is answered ----------------------------------------------------------------------------


def test_a_taste_is_made_voted_on_and_looked_at():
    assert done(routes.tastes()) == {"tastes": []}
    assert done(routes.create({"name": "warm"})) == {"name": "warm"}
    assert done(routes.act("warm", "next", {"window": "w"}))["pair"] is None
    places.open_taste("warm").offer(pictures(30), ["a hill"] * 30, "x")
    pair = done(routes.act("warm", "next", {"window": "w"}))["pair"]
    for choice in ("left", "right", "tie", "neither", "skip"):
        told = done(
            routes.act("warm", "vote", {"window": "w", "pair": pair["id"], "choice": choice})
        )
        pair = told["pair"]
    assert told["votes"] == 4  # a skipped pair does not count
    assert done(routes.act("warm", "undo", {"window": "w"}))["undone"]["choice"] == "skip"
    (brief,) = done(routes.tastes())["tastes"]
    assert (brief["name"], brief["votes"]) == ("warm", 4) and brief["folder"].endswith("warm")
    seen = done(routes.look("warm"))
    assert [vote["choice"] for vote in seen["last"]] == ["neither", "tie", "right", "left"]
    assert seen["offers"] == 30 and json.dumps(seen, allow_nan=False)


def test_what_it_knows_is_told():
    voted(places.folder() / "red", votes=60)
    done(routes.look("red"))
    desks.desk("red")._round.result()  # who looks has new votes fitted
    seen = done(routes.look("red"))
    assert any(line.startswith("agrees with you on") for line in seen["said"])
    assert seen["curve"][-1][0] <= 60
    ends = done(routes.ranking("red"))
    assert len(ends["first"]) == len(ends["last"]) == 8
    assert isinstance(routes.picture("red", ends["first"][0]), bytes)


def test_only_pictures_that_the_taste_holds_are_shown(warm, tmp_path):
    digest = warm.offers()[0].image
    assert routes.picture("warm", digest).startswith(b"\x89PNG")
    for name in ("0" * 64, digest.upper(), digest[:-1], "../votes", "", "٣" * 64):
        assert routes.picture("warm", name)[0] == 404
    assert routes.picture("cold", digest)[0] == 404
    secret = tmp_path / "secret.png"
    warm.image_file(digest).rename(secret)
    assert routes.picture("warm", digest)[0] == 404  # deleted
    warm.image_file(digest).symlink_to(secret)
    assert routes.picture("warm", digest)[0] == 404


@pytest.mark.parametrize("name", ["", "..", "../jobs", "WARM", "x" * 300, "a\0"])
def test_tastes_are_named_and_never_by_a_path(warm, name):
    answers = [routes.look(name), routes.ranking(name), routes.picture(name, "0" * 64)]
    answers += [routes.act(name, each, {}) for each in ("next", "vote", "undo", "delete", "ask")]
    for answer in answers:
        status, told = refused(answer)
        assert status == 404 or "there is no job" in told["error"]
    assert places.names() == ["warm"]


def test_what_cannot_be_done_is_said(warm):
    status, told = refused(routes.act("warm", "burn", {}))
    assert status == 404 and "next, vote, undo" in told["error"]
    asked = {"pair": "0" * 32, "choice": "left"}
    assert "not one of this taste" in refused(routes.act("warm", "vote", asked))[1]["error"]
    pair = done(routes.act("warm", "next", {}))["pair"]
    for choice in ("up", None, 7, ["left"]):
        told = refused(routes.act("warm", "vote", {"pair": pair["id"], "choice": choice}))[1]
        assert "is no choice; give one of left" in told["error"]
    assert warm.votes() == []
    for name, why in (("warm", "already"), ("a/b", "has / in it"), (None, "already")):
        if name is None:
            places.new_taste("None")
        status, told = refused(routes.create({"name": name}))
        assert status == 409 and why in told["error"]


# --- a job's samples -----------------------------------------------------------------------------


def test_a_job_s_samples_are_asked_about(warm, job):
    for iteration in (0, 5, 10, 15, 20, 25):
        sampled(job, iteration)
    told = done(routes.act("warm", "ask", {"job": job.root.name}))
    assert told["pairs"] == 8  # 4 prompts at 4 iterations, no picture twice
    pair = done(routes.act("warm", "next", {"window": "w"}))["pair"]
    assert pair["source"] == "samples of scenes" and pair["prompt"].startswith("prompt ")
    pairs = [p for p in warm.waiting() if p.source == "samples of scenes"]
    assert len(pairs) == 8 and all(p.prompt for p in pairs)  # two of one prompt
    (brief,) = done(routes.tastes())["tastes"]
    assert brief["waiting"] >= 8


def test_a_job_without_samples_is_one_sentence(warm, job):
    asked = {"job": job.root.name}
    assert "scenes has no samples yet" in refused(routes.act("warm", "ask", asked))[1]["error"]
    sampled(job, 0, prompts=2)
    assert done(routes.act("warm", "ask", asked))["pairs"] == 1  # no prompt has two
    assert "asked about already" in refused(routes.act("warm", "ask", asked))[1]["error"]
    for id in ("0" * 16, "../x", "", None):
        assert "there is no job" in refused(routes.act("warm", "ask", {"job": id}))[1]["error"]


def test_of_large_samples_few_are_offered(warm, job, monkeypatch):
    monkeypatch.setattr(desks, "MAX_PIXELS", 16 * 16 * 7)
    for iteration in (0, 5, 10):
        sampled(job, iteration)
    done(routes.act("warm", "ask", {"job": job.root.name}))
    offers = [offer for offer in warm.offers() if offer.source == "samples of scenes"]
    assert len(offers) == 8 and len({offer.prompt for offer in offers}) == 3


def test_no_link_is_followed_to_a_sample(warm, job, tmp_path):
    sampled(job, 0)
    job.samples.rename(tmp_path / "elsewhere")
    job.samples.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert "no samples" in refused(routes.act("warm", "ask", {"job": job.root.name}))[1]["error"]


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_deleted_taste_is_one_clear_sentence(warm, home):
    pair = done(routes.act("warm", "next", {"window": "w"}))["pair"]
    assert done(routes.act("warm", "delete", {})) == {"name": "warm"}
    assert list(home.iterdir()) == []  # with its pictures
    asked = {"window": "w", "pair": pair["id"], "choice": "left"}
    for answer in (routes.act("warm", "vote", asked), routes.act("warm", "next", asked),
                   routes.look("warm"), routes.act("warm", "delete", {})):  # fmt: skip
        status, told = refused(answer)
        assert status == 404 and "there is no taste 'warm'; it may have been" in told["error"]
    assert list(home.iterdir()) == []  # nothing comes back


def test_another_taste_of_the_same_name_is_another(warm, home):
    pair = done(routes.act("warm", "next", {"window": "w"}))["pair"]
    Store(home / "warm").delete()  # by another program
    fresh = places.new_taste("warm")
    fresh.offer(pictures(40, seed=1), [""] * 40, "y")
    told = done(routes.act("warm", "next", {"window": "w"}))
    assert told["pair"]["id"] != pair["id"] and told["offers"] == 40


def test_two_windows_lose_no_vote(warm):
    def vote_on(window):
        told = done(routes.act("warm", "next", {"window": window}))
        cast = []
        while told["pair"] and len(cast) < 15:
            cast.append(told["pair"]["id"])
            asked = {"window": window, "pair": cast[-1], "choice": "left"}
            told = done(routes.act("warm", "vote", asked))
        return cast

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(vote_on, "ab")
    assert len(one) == len(other) == 15 and not {*one} & {*other}
    assert {vote.pair for vote in Store(warm.root).votes()} == {*one, *other}


def test_a_damaged_line_and_a_picture_that_is_gone_are_passed_over(warm):
    pair = done(routes.act("warm", "next", {"window": "w"}))["pair"]
    asked = {"window": "w", "pair": pair["id"], "choice": "left"}
    with (warm.root / "votes.jsonl").open("ab") as file:
        file.write(b"\xff{half a line")
    assert done(routes.act("warm", "vote", asked))["votes"] == 1
    shown = done(routes.act("warm", "next", {"window": "w"}))["pair"]
    warm.image_file(shown["left"]).unlink()
    assert done(routes.act("warm", "next", {"window": "w"}))["pair"]["id"] != shown["id"]
    warm.image_file(pair["left"]).unlink()
    assert done(routes.look("warm"))["votes"] == 0


# --- the handlers --------------------------------------------------------------------------------


class Server:
    """As much of ComfyUI's as `register` uses."""

    def __init__(self):
        self.found, self.routes = {}, self

    def route(self, method, path):
        return lambda handler: self.found.setdefault((method, path), handler)

    def get(self, path):
        return self.route("GET", path)

    def post(self, path):
        return self.route("POST", path)


@pytest.fixture
def served(monkeypatch):
    server = Server()
    monkeypatch.setattr(access, "server", lambda: server)
    routes.register()
    return server.found


def send(handler, *given, **named):
    return asyncio.run(handler(request(*given, **named)))


def test_a_page_of_comfyui_reads_and_changes(served):
    status, told, _ = send(served["POST", "/pcpo/tastes"], "POST", [b'{"name": "warm"}'])
    assert (status, told) == (200, {"name": "warm"})
    assert send(served["GET", "/pcpo/tastes"], "GET")[1]["tastes"][0]["name"] == "warm"
    assert send(served["GET", "/pcpo/tastes/{name}"], "GET", name="warm")[1]["votes"] == 0
    change = served["*", "/pcpo/tastes/{name}/{action}"]
    assert send(change, "POST", name="warm", action="delete")[0] == 200
    assert places.names() == []


def test_others_neither_read_nor_change(served, warm):
    evil = {"headers": {"Origin": "https://evil.example"}, "name": "warm", "action": "delete"}
    evil |= {"digest": warm.offers()[0].image}
    for (method, _), handler in served.items():
        method = "POST" if method == "*" else method
        assert send(handler, method, **evil)[0] == 403
    change = served["*", "/pcpo/tastes/{name}/{action}"]
    assert send(change, "GET", name="warm", action="delete")[0] == 405
    plain = {"headers": {"Content-Type": "text/plain"}}
    assert send(change, "POST", name="warm", action="delete", **plain)[0] == 415
    assert send(change, "POST", [b"[]"], name="warm", action="delete")[0] == 400
    assert places.names() == ["warm"]


def test_a_picture_is_not_kept_by_the_browser(served, warm):
    handler = served["GET", "/pcpo/tastes/{name}/images/{digest}"]
    digest = warm.offers()[0].image
    status, body, headers = send(handler, "GET", name="warm", digest=digest)
    assert status == 200 and body.startswith(b"\x89PNG")
    assert headers["Cache-Control"] == "no-store" and headers["Content-Type"] == "image/png"


def test_nothing_is_registered_without_a_server(monkeypatch):
    monkeypatch.setattr(access, "server", lambda: None)
    routes.register()
