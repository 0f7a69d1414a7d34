"""What a reward server lets one client cost: pixels, bytes, connections, time."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import tracemalloc

import pytest
import torch
from comfyui_pcpo.pcpo.remote.http import Link, WebError
from comfyui_pcpo.pcpo.remote.messages import Answer, Question
from comfyui_pcpo.pcpo.remote.protocol import WireError
from comfyui_pcpo.pcpo.rewards import load_reward
from http_fixture import Reply, Scripted
from PIL import Image

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")


class Local:
    """A reward server in a thread of this process, with limits of a test's own."""

    def __init__(self, host="127.0.0.1", **limits):
        from comfyui_pcpo.trainers.reward_server import server as serve

        self.listener = socket.create_server((host, 0))
        self.address = self.listener.getsockname()[:2]
        self.url = f"http://{self.address[0]}:{self.address[1]}"
        self.server = serve.server_of({"brightness": load_reward("brightness")}, **limits)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        self.listener.close()

    def ask(self, path, body=None):
        return Link(20, 1 << 22, 0, "PCPO_REWARDS").ask(self.url + path, body)

    def raw(self, text, timeout=5.0):
        """A connection on which this was sent."""
        made = socket.create_connection(self.address, timeout)
        made.sendall(text)
        return made


def read(connection):
    try:
        return connection.makefile("rb").read().decode()
    except ConnectionError:
        return ""


def png(*size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


SCORE = "/rewards/brightness/score"


@pytest.fixture(scope="module")
def served():
    with Local(idle_seconds=0.4, connections=12, of_one=8) as running:
        yield running


# --- pixels ----------------------------------------------------------------------------------


def test_pixels_are_counted_before_any_is_decoded(served):
    body = {"images": [png(4096, 4096, mode="1")] * 8, "prompts": [""] * 8}
    tracemalloc.start()
    began = time.monotonic()
    with pytest.raises(WebError, match=r"HTTP 413 .the images have 134217728 pixels"):
        served.ask(SCORE, body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - began < 10 and peak < 100 << 20


def test_an_image_of_too_many_pixels_costs_itself_alone(served):
    body = {"images": [png(8192, 8192, mode="1"), png(8, 8)], "prompts": [""] * 2}
    found = Answer.read(served.ask(SCORE, body), 2).scores()
    assert found.values[0].isnan() and "8192x8192 pixels" in found.errors[0]
    assert found.values[1] == 0


def test_a_client_sends_no_more_pixels_than_the_server_takes():
    def answer(asked):
        said = {"health": {**HEALTH, "limits": LIMITS | {"pixels": 200}}, "r": DESCRIPTION}
        count = len(asked.body["prompts"]) if asked.body else 0
        said |= {"complaints": {"complaints": [None] * count}, "score": {"values": [1.0] * count}}
        return Reply(said[asked.path.rsplit("/", 1)[-1]])

    with Scripted(answer) as server:
        far = load_reward("remote", url=server.url, retries=0)
        found = far.score(torch.zeros(5, 3, 10, 10, dtype=torch.uint8), [""] * 5)
        assert found.values.tolist() == [1.0] * 5
        sent = [len(a.body["images"]) for a in server.asked if a.body and "images" in a.body]
        assert sent == [2, 2, 1]
        found = far.score(torch.zeros(1, 3, 20, 20, dtype=torch.uint8), [""])
        assert (
            found.values.isnan().all()
            and "400 pixels, more than the server takes" in found.errors[0]
        )


LIMITS = {"batch": 64, "request_bytes": 1 << 20, "pixels": 1 << 24}
HEALTH = {"version": 1, "rewards": ["r"], "limits": LIMITS}
DESCRIPTION = {"needs_prompt": False, "bounds": [0, None], "fingerprint": {}}


# --- text ------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_costs_its_image_alone(served):
    body = {"images": [png(8, 8)] * 2, "prompts": ["a" * 70_000, "b"]}
    found = Answer.read(served.ask(SCORE, body), 2).scores()
    assert found.values[0].isnan() and "70000 characters" in found.errors[0]
    assert found.values[1] == 0
    said = served.ask("/rewards/brightness/complaints", {"prompts": ["a" * 70_000, "b"]})
    assert "70000 characters" in said["complaints"][0] and said["complaints"][1] is None


def test_prompts_are_counted(served):
    with pytest.raises(WebError, match=r"HTTP 422 .the request has 100 prompts; at most 64"):
        served.ask("/rewards/brightness/complaints", {"prompts": ["a"] * 100})


def test_json_of_millions_of_parts_is_not_built(served):
    raw = b'{"images": [' + b"[]," * 3_000_000 + b'[]], "prompts": []}'
    head = f"POST {SCORE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
    tracemalloc.start()
    with served.raw(head.encode() + raw, 20) as connection:
        said = read(connection)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert " 413 " in said and "parts" in said
    assert peak < 60 << 20


def test_the_faults_of_a_request_are_not_all_listed():
    # a million wrong prompts would cost some hundred bytes each
    with pytest.raises(WireError, match=r"prompts is .1, 1, 1.*at most 65536 items"):
        Question.read({"images": [], "prompts": [1] * 1_000_000})


def test_what_the_server_says_of_itself(served):
    assert served.ask("/health") == {**HEALTH, "rewards": ["brightness"]} | {
        "limits": LIMITS | {"request_bytes": 64 << 20}
    }


# --- connections -----------------------------------------------------------------------------


def test_one_address_does_not_shut_out_the_others(served):
    idle = [served.raw(b"") for _ in range(70)]
    try:
        time.sleep(0.1)
        refused = [c for c in idle if _has_answer(c)]
        assert len(refused) == 62 and " 429 " in read(refused[0])
        with socket.socket() as other:  # Linux has all of 127.0.0.0/8
            other.bind(("127.0.0.2", 0))
            other.settimeout(5)
            other.connect(served.address)
            other.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            assert read(other).startswith("HTTP/1.1 200")
    finally:
        for connection in idle:
            connection.close()


def _has_answer(connection):
    connection.settimeout(0.05)
    try:
        return bool(connection.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return False


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "])
def test_a_connection_without_a_request_is_closed(served, start):
    connection, began = served.raw(start), time.monotonic()
    with connection:
        while time.monotonic() - began < 3:
            try:
                connection.sendall(b"a" if start else b"")
                if not connection.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
            finally:
                connection.settimeout(0.1)
    assert time.monotonic() - began < 2


def test_a_connection_that_is_used_stays(served):
    ask = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with served.raw(ask) as connection:
        for _ in range(6):
            time.sleep(0.25)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
            connection.sendall(ask)


def test_two_requests_of_an_address_are_read_at_once():
    with Local(idle_seconds=5) as server:
        head = f"POST {SCORE} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        slow = [server.raw(f"{head}Content-Length: 9\r\n\r\n{{".encode()) for _ in range(4)]
        try:
            with socket.socket() as other:
                other.bind(("127.0.0.2", 0))
                other.settimeout(5)
                other.connect(server.address)
                body = json.dumps({"images": [], "prompts": []})
                end = f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
                other.sendall((head + end).encode())
                assert read(other).startswith("HTTP/1.1 200")
        finally:
            for connection in slow:
                connection.close()


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_page_whose_name_leads_here_is_not_answered(served, host):
    ask = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with served.raw(ask.encode()) as connection:
        assert read(connection).startswith("HTTP/1.1 403")


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:80", "LOCALHOST."])
def test_loopback_has_several_names(served, host):
    ask = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with served.raw(ask.encode()) as connection:
        assert read(connection).startswith("HTTP/1.1 200")


def test_a_server_for_all_goes_by_any_name():
    with Local("0.0.0.0", is_local=False) as server:
        ask = "GET /health HTTP/1.1\r\nHost: gpu.example\r\nConnection: close\r\n\r\n"
        with server.raw(ask.encode()) as connection:
            assert read(connection).startswith("HTTP/1.1 200")


@pytest.mark.parametrize("status", [429, 503])
def test_a_client_that_is_put_off_asks_again(status, monkeypatch):
    from comfyui_pcpo.pcpo.remote import http as web

    monkeypatch.setattr(web, "PAUSE_S", 0.01)
    replies = [Reply({"error": "busy"}, status), Reply(HEALTH)]
    with Scripted(lambda _: replies.pop(0)) as server:
        assert load_reward("remote", url=server.url, retries=1).health.rewards == ["r"]
