"""JSON over HTTP: what is tried again, what is refused, and where a key goes."""

from __future__ import annotations

import socket
import time

import pytest
from comfyui_pcpo.pcpo.remote import http as web
from comfyui_pcpo.pcpo.remote.http import Link, WebError, checked_url, key_header, origin
from comfyui_pcpo.pcpo.rewards import RewardUnavailable
from http_fixture import Reply, Scripted, in_order

KEY = "PCPO_TEST"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(web, "PAUSE_S", 0.01)


def link(timeout=5.0, limit=1000, retries=2):
    return Link(timeout, limit, retries, KEY)


def failure(answer, **settings):
    """The error of a link to a server that answers so, and how often it was asked."""
    with Scripted(answer) as server, pytest.raises(WebError) as error:
        link(**settings).ask(server.url)
    return str(error.value), len(server.asked)


def test_a_question_is_posted_and_a_look_is_a_get():
    with Scripted(in_order(Reply({"is": "there"}))) as server:
        assert link().ask(server.url + "/a") == {"is": "there"}
        assert link().ask(server.url + "/b", {"text": 'é "'}) == {"is": "there"}
    look, question = server.asked
    assert (look.method, look.path, look.body) == ("GET", "/a", None)
    assert (question.method, question.path, question.body) == ("POST", "/b", {"text": 'é "'})
    assert question.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status):
    told = []
    with Scripted(in_order(Reply(status=status), Reply(status=status), Reply([1]))) as server:
        assert link().ask(server.url, note=told.append) == [1]
    assert len(server.asked) == 3
    assert len(told) == 2
    assert f"HTTP {status}" in told[0]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 501])
def test_what_will_not_pass_is_asked_once(status):
    said, asked = failure(in_order(Reply({"error": "no\nsuch  thing"}, status)))
    assert said == f"HTTP {status} (no such thing)"
    assert asked == 1


def test_tries_are_counted_in_the_error():
    said, asked = failure(
        in_order(Reply(b"<html>", 502), Reply({"error": {"message": "full"}}, 500))
    )
    assert said == "HTTP 502 (Bad Gateway), HTTP 500 (full) (2 tries)"
    assert asked == 3


def test_no_retries_is_one_try():
    assert failure(in_order(Reply(status=500)), retries=0)[1] == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    with Scripted(in_order(Reply("stolen"))) as other:
        said, asked = failure(in_order(Reply(status=status, headers={"Location": other.url})))
    assert said == f"HTTP {status}, a redirect, which is not followed"
    assert asked == 1
    assert other.asked == []


def test_a_slow_answer_is_tried_again_and_then_given_up():
    started = time.monotonic()
    said, asked = failure(in_order(Reply([], delay=30)), timeout=0.2, retries=1)
    assert said == "no answer within 0.2 s (2 tries)"
    assert asked == 2
    assert time.monotonic() - started < 5


def test_an_answer_that_drips_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(WebError) as error:
        import threading

        def drip():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    time.sleep(0.05)
                    try:
                        connection.sendall(b" ")
                    except OSError:
                        return

        threading.Thread(target=drip, daemon=True).start()
        link(timeout=0.4, retries=0).ask(f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert str(error.value) == "no answer within 0.4 s"


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(WebError, match=r"^connection refused \(3 tries\)$"):
        link().ask(url)


def test_a_connection_that_breaks_off_is_tried_again():
    said, asked = failure(in_order(Reply({"long": "answer"}, missing=50)))
    assert said == "the connection broke off (3 tries)"
    assert asked == 3


@pytest.mark.parametrize(
    "raw", [b"<html>", b"", b"{", b'{"a": NaN}', b"[Infinity]", b"\xff\xfe", b"[" * 900]
)
def test_an_answer_that_is_no_json_is_not_asked_for_again(raw):
    said, asked = failure(in_order(Reply(raw)))
    assert said.startswith("an answer that is no JSON: ")
    assert len(said) < 400
    assert asked == 1


def test_an_answer_that_is_nested_too_deeply_is_none():
    said, _ = failure(in_order(Reply(b"[" * 100_000 + b"]" * 100_000)), limit=1_000_000)
    assert said.startswith("an answer that is no JSON: ")


def test_an_answer_has_a_largest_size():
    assert failure(in_order(Reply("a" * 999)))[0] == "an answer of more than 1000 bytes"
    with Scripted(in_order(Reply("a" * 998))) as server:
        assert link().ask(server.url) == "a" * 998


def test_a_server_says_how_long_to_wait(monkeypatch):
    waited = []
    monkeypatch.setattr(web.time, "sleep", waited.append)
    again = [Reply(status=429, headers={"Retry-After": after}) for after in ("7", "9999", "soon")]
    replies = iter([*again, Reply([])])
    monkeypatch.setattr(web, "_once", lambda *_: _answered(next(replies)))
    link(retries=3).ask("http://127.0.0.1:1")
    assert waited == [7, web.LONGEST_PAUSE_S, 0.04]


def _answered(reply):
    from email.message import Message
    from urllib.error import HTTPError

    if reply.status == 200:
        return reply.body
    headers = Message()
    for name, value in reply.headers.items():
        headers[name] = value
    raise web._of_status(HTTPError("", reply.status, "", headers, None))


# --- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8000/v1", "https://example.org", "http://[::1]:80", "http://gpu/a/b"]
)
def test_addresses(url):
    assert checked_url(url) == checked_url(url + "/") == url


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "file:///etc/passwd", "ftp://a/b", "http://", "http:///x"),
        *("http://a:port", "http://a:99999", "http://a b", "http://a/\n", "http://é.org"),
        *("http://a/?q=1", "http://a/#x", "http://a\\@b"),
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ValueError, match="the url is "):
        checked_url(url)


@pytest.mark.parametrize("url", ["http://me:secret@a/", "http://secret@a", "http://a b:secret@c"])
def test_a_password_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="the url ") as error:
        checked_url(url)
    assert "secret" not in str(error.value)


def test_origins():
    assert origin("HTTP://Example.org/a") == origin("http://example.org:80/b")
    assert origin("https://example.org") == ("https", "example.org", 443)
    for other in ("https://example.org", "http://example.org:8080", "http://example.com"):
        assert origin(other) != origin("http://example.org")


# --- the key ---------------------------------------------------------------------------------


def test_a_key_goes_to_its_own_server_alone(monkeypatch):
    monkeypatch.setenv(f"{KEY}_KEY", "secret")
    with Scripted(in_order(Reply([]))) as own, Scripted(in_order(Reply([]))) as other:
        monkeypatch.setenv(f"{KEY}_URL", own.url + "/v1")
        link().ask(own.url + "/v1/chat")
        link().ask(other.url + "/v1/chat")
    assert own.asked[0].headers["Authorization"] == "Bearer secret"
    assert "Authorization" not in other.asked[0].headers


@pytest.mark.parametrize(
    "home", ["", "nonsense", "http://127.0.0.1:8001", "https://127.0.0.1:8000"]
)
def test_a_key_without_its_address_goes_nowhere(monkeypatch, home):
    monkeypatch.setenv(f"{KEY}_KEY", "secret")
    monkeypatch.setenv(f"{KEY}_URL", home)
    assert key_header("http://127.0.0.1:8000", KEY) == {}


def test_no_key_is_no_header(monkeypatch):
    monkeypatch.setenv(f"{KEY}_URL", "http://127.0.0.1:8000")
    assert key_header("http://127.0.0.1:8000", KEY) == {}


@pytest.mark.parametrize("key", ["sec\nret", "secrét"])
def test_a_key_that_is_none_is_refused_and_not_repeated(monkeypatch, key):
    monkeypatch.setenv(f"{KEY}_KEY", key)
    monkeypatch.setenv(f"{KEY}_URL", "http://127.0.0.1:8000")
    with pytest.raises(RewardUnavailable, match="PCPO_TEST_KEY has characters") as error:
        key_header("http://127.0.0.1:8000", KEY)
    assert key not in str(error.value)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    with Scripted(in_order(Reply([1]))) as server, Scripted(in_order(Reply("proxy"))) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert link().ask(server.url) == [1]
    assert proxy.asked == []
