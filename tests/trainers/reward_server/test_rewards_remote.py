"""The reward server and the reward that asks it, in two processes."""

from __future__ import annotations

import base64
import io
import pickle
import subprocess
import sys
import threading
import time
import zlib

import pytest
import torch
from comfyui_pcpo.pcpo.remote import http as web
from comfyui_pcpo.pcpo.remote import protocol
from comfyui_pcpo.pcpo.remote.http import Link, WebError
from comfyui_pcpo.pcpo.remote.messages import Answer
from comfyui_pcpo.pcpo.rewards import RewardUnavailable, Scores, load_reward
from comfyui_pcpo.pcpo.rewards.base import BatchReward
from http_fixture import Reply, RewardServer, Scripted
from PIL import Image
from torch.testing import assert_close

torch.set_num_threads(1)

OPTIONS = "jpeg_compressibility.quality=50"
SMALL_MIB = 1


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(web, "PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def server():
    names = ("jpeg_compressibility", "colour", "sharpness")
    with RewardServer(*names, "--options", OPTIONS, "--port", "0") as running:
        yield running


@pytest.fixture(scope="module")
def small_server():
    limits = ("--batch", "3", "--request-mib", str(SMALL_MIB))
    with RewardServer("brightness", "--port", "0", *limits, PCPO_REWARDS_KEY="sesame") as running:
        yield running


@pytest.fixture
def with_key(small_server, monkeypatch):
    monkeypatch.setenv("PCPO_REWARDS_KEY", "sesame")
    monkeypatch.setenv("PCPO_REWARDS_URL", small_server.url)
    return small_server


def noise(*shape, seed=0):
    drawn = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.uint8)


def remote(server, name="", **options):
    return load_reward("remote", **{"url": server.url, "reward": name, "retries": 1, **options})


def post(server, path, body):
    return Link(20, 1 << 20, 0, "PCPO_REWARDS").ask(server.url + path, body)


# --- equal to the reward itself --------------------------------------------------------------


@pytest.mark.parametrize("name", ["jpeg_compressibility", "colour", "sharpness"])
def test_a_remote_reward_equals_the_reward(server, name):
    options = {"quality": 50} if name == "jpeg_compressibility" else {}
    own, far = load_reward(name, **options), remote(server, name)
    images, prompts = noise(4, 3, 20, 31), ["red", "a Blue fish", "grey", "white"]
    here, there = own.score(images, prompts), far.score(images, prompts)
    assert torch.equal(here.values, there.values)
    assert there.values.dtype == torch.float32
    assert there.errors == ()
    assert (far.needs_prompt, far.bounds, far.unit) == (own.needs_prompt, own.bounds, own.unit)
    assert far.fingerprint() == {"reward": "remote", "served": own.fingerprint()}


def test_pictures_of_any_size_and_mode_and_an_error_an_image(server):
    pictures = [
        *(Image.new("RGBA", (9, 5), (250, 20, 30, 40)), Image.new("L", (2, 2), 9)),
        *(Image.new("RGB", (1, 1)), Image.effect_noise((30, 40), 50)),
    ]
    here = load_reward("sharpness").score(pictures, [""] * 4)
    there = remote(server, "sharpness").score(pictures, [""] * 4)
    assert_close(there.values, here.values, equal_nan=True, rtol=0, atol=0)
    assert there.errors == here.errors
    assert [bool(why) for why in there.errors] == [False, True, True, False]


def test_details_come_along():
    scores = Scores(torch.tensor([1.5, float("nan")]), ({"a": float("inf")}, {}), (None, "why"))
    found = Answer.read(protocol.encode_scores(scores), 2).scores()
    assert found.values[0] == 1.5
    assert found.values[1].isnan()
    assert found.details[0]["a"] != found.details[0]["a"]
    assert found.errors == (None, "why")


def test_a_picture_comes_through_unchanged():
    picture = Image.effect_noise((33, 21), 80).convert("RGB")
    assert protocol.decode_picture(protocol.encode_picture(picture)).tobytes() == picture.tobytes()


def test_complaints_are_the_servers_and_asked_once(server, monkeypatch):
    asked, ask = [], Link.ask
    monkeypatch.setattr(
        Link, "ask", lambda self, url, *rest: (asked.append(url), ask(self, url, *rest))[1]
    )
    far, prompts = remote(server, "colour"), ["red", "", 'a "quoted" 🐈', "red", "x" * 50_000]
    expected = load_reward("colour").complaints(prompts)
    assert far.complaints(prompts) == expected
    assert [why is None for why in expected] == [True, False, False, True, False]
    assert far.complaints(prompts) == expected
    assert sum(url.endswith("/complaints") for url in asked) == 1


# --- limits ----------------------------------------------------------------------------------


def test_images_go_in_as_many_requests_as_the_server_asks_for(with_key, monkeypatch):
    asked, ask = [], Link.ask
    monkeypatch.setattr(
        Link, "ask", lambda self, *a: (asked.append(a[1] if a[1:] else None), ask(self, *a))[1]
    )
    images, far = noise(7, 3, 8, 8), remote(with_key)
    expected = load_reward("brightness").score(images, [""] * 7).values
    assert torch.equal(far.score(images, [""] * 7).values, expected)
    assert [len(body["images"]) for body in asked if body and "images" in body] == [3, 3, 1]


def test_large_images_go_one_by_one_and_too_large_ones_not_at_all(with_key):
    fits = [Image.effect_noise((700, 700), 90 + i) for i in range(3)]  # 0.5 MiB each as PNG
    large = Image.frombytes("RGB", (600, 700), noise(600 * 700 * 3).numpy().tobytes())
    pictures = [*fits[:2], large, fits[2]]
    found = remote(with_key).score(pictures, [""] * 4)
    expected = load_reward("brightness").score(pictures, [""] * 4)
    assert found.values[2].isnan()
    assert "bytes as sent, more than the server takes" in found.errors[2]
    assert torch.equal(found.values[[0, 1, 3]], expected.values[[0, 1, 3]])
    assert [found.errors[i] for i in (0, 1, 3)] == [None] * 3


def test_a_prompt_too_long_for_the_server_is_complained_of(with_key):
    far = remote(with_key)
    assert far.complaints(["short", "long" * 300_000]) == [
        None,
        "the prompt is longer than the server takes",
    ]


def test_a_request_that_is_too_large_is_refused(with_key):
    with pytest.raises(WebError, match=r"HTTP 413 .a request has at most 1048576 bytes|broke off"):
        post(
            with_key,
            "/rewards/brightness/score",
            {"images": ["a" * (SMALL_MIB << 20)], "prompts": [""]},
        )
    with pytest.raises(WebError, match="has 4 prompts; at most 3 go into one"):
        post(with_key, "/rewards/brightness/score", {"images": [""] * 4, "prompts": [""] * 4})


# --- the key ---------------------------------------------------------------------------------


def test_a_server_with_a_key_is_closed_without_it(small_server, monkeypatch):
    monkeypatch.delenv("PCPO_REWARDS_KEY", raising=False)
    with pytest.raises(RewardUnavailable, match=r"HTTP 401 .this server wants a key: set PCPO_REW"):
        remote(small_server).score(noise(1, 3, 8, 8), [""])
    monkeypatch.setenv("PCPO_REWARDS_KEY", "sesam")
    monkeypatch.setenv("PCPO_REWARDS_URL", small_server.url)
    with pytest.raises(RewardUnavailable, match=r"HTTP 401"):
        remote(small_server).score(noise(1, 3, 8, 8), [""])


def test_a_server_with_a_key_is_open_with_it(with_key):
    assert remote(with_key).score(noise(1, 3, 8, 8), [""]).values.isfinite().all()


# --- requests that are wrong -----------------------------------------------------------------


def file_of(picture, kind="PNG"):
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def vast_png(side):
    """A PNG of side x side pixels in a few bytes."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    size = side.to_bytes(4) * 2 + bytes([8, 0, 0, 0, 0])
    data = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + data


def test_one_bad_image_in_a_request_costs_that_image_alone(server):
    good = file_of(Image.new("RGB", (8, 8), (128, 128, 128)))
    cut = file_of(Image.effect_noise((40, 40), 90))[:900]
    bad = [
        *(
            b"",
            b"no picture",
            cut,
            vast_png(9_000),
            vast_png(100_000),
            pickle.dumps({"images": []}),
        ),
        file_of(Image.new("RGB", (8, 8)), "JPEG"),
    ]
    files = [base64.b64encode(raw).decode() for raw in [good, *bad, good]]
    files[2:2] = ["not base64 !", 7, None]
    body = {"images": files, "prompts": ["grey"] * len(files)}
    found = Answer.read(post(server, "/rewards/colour/score", body), len(files)).scores()
    ends = [0, len(files) - 1]
    assert found.values[ends].tolist() == [1, 1]
    assert found.values[1:-1].isnan().all()
    assert [bool(why) for why in found.errors] == [i not in ends for i in range(len(files))]
    vast = [why for why in found.errors if why and "9000x9000 pixels" in why]
    assert len(vast) == 1


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ([], "HTTP 422 .the message is ..: Input should be a valid dictionary"),
        ({}, "HTTP 422 .prompts: Field required"),
        (
            {"images": "abc", "prompts": []},
            "HTTP 422 .images is 'abc': Input should be a valid l",
        ),
        ({"images": [], "prompts": ["a"]}, "HTTP 422 .there are 1 prompts for 0 images"),
        (
            {"images": [""], "prompts": [3]},
            "HTTP 422 .prompts.0 is 3: Input should be a valid",
        ),
        (
            {"images": [""] * 65, "prompts": [""] * 65},
            "HTTP 422 .the request has 65 prompts; at",
        ),
    ],
)
def test_a_wrong_request_is_answered_with_one_sentence(server, body, why):
    with pytest.raises(WebError, match=why):
        post(server, "/rewards/colour/score", body)


@pytest.mark.parametrize(
    ("raw", "kind", "why"),
    [
        (b"{", "application/json", "400"),
        (b"[" * 100_000, "application/json", "400"),
        (pickle.dumps({"images": []}), "application/json", "400"),
        (b"{}", "text/plain", "415"),
        (b"", "", "415"),
    ],
)
def test_what_is_not_json_is_refused(server, raw, kind, why):
    import urllib.error
    import urllib.request

    request = urllib.request.Request(
        server.url + "/rewards/colour/score", raw, {"Content-Type": kind}
    )
    with pytest.raises(urllib.error.HTTPError, match=why):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20)


def test_an_empty_batch(server):
    body = post(server, "/rewards/colour/score", {"images": [], "prompts": []})
    assert body == {"values": [], "details": [], "errors": []}


# --- servers that are wrong ------------------------------------------------------------------


def test_nothing_is_asked_before_it_is_needed():
    reward = load_reward("remote", url="http://127.0.0.1:9", retries=0)
    assert reward.name == "remote"
    assert reward.modules() == []
    for need in (lambda: reward.needs_prompt, lambda: reward.bounds, reward.fingerprint):
        with pytest.raises(RewardUnavailable, match=r"server at http://127.0.0.1:9 cannot be used"):
            need()


def test_a_reward_that_the_server_does_not_have(server):
    with pytest.raises(RewardUnavailable, match="has jpeg_compressibility, colour, sharpness; set"):
        remote(server).score(noise(1, 3, 4, 4), ["red"])
    with pytest.raises(RewardUnavailable, match=r"'reward' \(now 'beauty'\)"):
        remote(server, "beauty").score(noise(1, 3, 4, 4), ["red"])


HEALTH = {"version": 1, "rewards": ["r"], "limits": {"batch": 2, "request_bytes": 9999}}
DESCRIPTION = {"needs_prompt": False, "bounds": [0, None], "fingerprint": {}}


def answers(scores, health=HEALTH):
    def answer(asked):
        kind = asked.path.rsplit("/", 1)[-1]
        count = len(asked.body["prompts"]) if asked.body else 0
        replies = {"health": health, "r": DESCRIPTION, "complaints": {"complaints": [None] * count}}
        return Reply(replies.get(kind, scores))

    return answer


@pytest.mark.parametrize(
    ("scores", "why"),
    [
        ({"values": [1.0]}, "values has 1 entries for 2 images"),
        ({"values": "12"}, "values is '12': Input should be a valid list"),
        ({"values": [1.0, "2"]}, "values.1 is '2': Input should be a valid number"),
        ({"values": [1.0, True]}, "values.1 is True: Input should be a valid number"),
        ({"values": [1, 2], "errors": ["a"]}, "errors has 1 entries for 2 images"),
        ({"values": [1, 2], "details": [1, {}]}, "details.0 is 1: Input should be a valid dict"),
        (b'{"values": [1, 1e999]}', "values.1 is inf: Input should be less than or equal"),
        (
            b'{"values": [1, -1e39]}',
            "values.1 is -1e.39: Input",
        ),  # infinite in float32
        (b'{"values": [1, %s]}' % (b"9" * 400), "values.1 is 9{10,}.*valid number"),
        (b'{"values": [1, %s]}' % (b"9" * 5000), "an answer that is no JSON"),
        (b'{"values": [1, 2], "details": [{"a": 1e999}, {}]}', "details.0.a is inf"),
        (b'{"values": [1, NaN]}', "an answer that is no JSON"),
        ([1, 2], "the message is .1, 2.: Input should be a valid dict"),
        (b"\x80\x04garbage", "an answer that is no JSON"),
        ("x" * (protocol.ANSWER_BYTES + 1), "an answer of more than 4194304 bytes"),
    ],
)
def test_scores_that_are_none_are_not_taken(scores, why):
    with Scripted(answers(scores)) as server, pytest.raises(RewardUnavailable, match=why):
        remote(server).score(noise(2, 3, 4, 4), ["", ""])


@pytest.mark.parametrize(
    ("health", "why"),
    [
        ({"status": "ok"}, "what answers there is no reward server of this version .version: Fi"),
        ([], "what answers there is no reward server"),
        (
            {**HEALTH, "version": 2},
            "version is 2: Input should be 1.; use the same version of this pack at both ends",
        ),
        ({**HEALTH, "rewards": []}, "rewards is .*at least 1 item"),
        ({**HEALTH, "limits": {"batch": 0, "request_bytes": 5}}, "limits.batch is 0"),
        (
            {**HEALTH, "limits": {"batch": 10**30, "request_bytes": True}},
            "limits.request_bytes is",
        ),
    ],
)
def test_a_server_of_another_kind_is_not_used(health, why):
    with Scripted(answers({}, health)) as server, pytest.raises(RewardUnavailable, match=why):
        remote(server).score(noise(1, 3, 4, 4), [""])


def test_a_negative_zero_is_a_number():
    with Scripted(answers({"values": [-0.0, 0]})) as server:
        assert remote(server).score(noise(2, 3, 4, 4), ["", ""]).values.tolist() == [0, 0]


def test_a_null_without_a_reason_is_no_reward_either():
    with Scripted(answers({"values": [1.5, None]})) as server:
        found = remote(server).score(noise(2, 3, 4, 4), ["", ""])
    assert found.values[0] == 1.5
    assert found.values[1].isnan()
    assert found.errors == (None, "it gives no number (NaN)")


def test_a_server_that_recovers_is_asked_again():
    good, calls = answers({"values": [0.25]}), []

    def answer(asked):
        if asked.path.endswith("/score"):
            calls.append(asked)
            if len(calls) == 1:
                return Reply({"error": "out of memory"}, 500)
        return good(asked)

    with Scripted(answer) as server:
        assert remote(server).score(noise(1, 3, 4, 4), [""]).values.item() == 0.25
    assert len(calls) == 2


def test_a_slow_server_stops_the_scoring():
    def answer(asked):
        is_score = asked.path.endswith("/score")
        return Reply({"values": [1]}, delay=20) if is_score else answers({})(asked)

    with (
        Scripted(answer) as server,
        pytest.raises(RewardUnavailable, match=r"no answer within 0.3 s"),
    ):
        remote(server, timeout_seconds=0.3).score(noise(1, 3, 4, 4), [""])


def test_a_server_that_is_killed_stops_the_scoring_and_its_return_continues_it():
    images = noise(2, 3, 8, 8)
    with RewardServer("symmetry", "--port", "0") as first:
        reward = remote(first)
        before = reward.score(images, ["", ""]).values
        first.kill()
        with pytest.raises(RewardUnavailable) as error:
            reward.score(images, ["", ""])
        assert str(error.value) == (
            f"the reward server at {first.url} cannot be used: connection refused (2 tries); see "
            "that this pack's command rewards serve runs there, or set the option 'url' of the "
            "reward 'remote'"
        )
        with RewardServer("symmetry", "--port", first.url.rsplit(":", 1)[1]):
            assert torch.equal(reward.score(images, ["", ""]).values, before)


# --- options ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"url": "127.0.0.1:8765"}, "the url is '127.0.0.1:8765'"),
        ({"url": "http://me:pass@host"}, "has a user name or a password in it"),
        ({"timeout_seconds": 0}, "timeout_seconds is 0"),
        ({"timeout_seconds": float("nan")}, "'timeout_seconds' of the reward 'remote' is nan"),
        ({"retries": -1}, "retries is -1"),
        ({"retries": 2.5}, "retries is 2.5"),
        ({"reward": None}, "reward is None"),
    ],
)
def test_options_that_are_none_are_refused_at_once(options, why):
    with pytest.raises(ValueError, match=why):
        load_reward("remote", **options)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["beauty"], "needs the reward 'beauty', which is not in this version"),
        (["colour", "colour"], "the reward 'colour' is given twice"),
        (["colour", "--options", "{"], "'{' is no option; write NAME.OPTION=VALUE"),
        (
            ["colour", "--options", "ocr.mode=exact"],
            "an option of 'ocr', but the rewards are colour",
        ),
        (["colour", "--options", "colour.a=1"], "has no option 'a'"),
        (["jpeg_compressibility", "--options", "jpeg_compressibility.quality=0"], "quality"),
        (["colour", "--port", "70000"], "70000"),
        (["colour", "--host", "192.0.2.1"], "192.0.2.1 port 8765 cannot be listened at"),
        ([], "at least 1"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments, why):
    from comfyui_pcpo.trainers.errors import UserError
    from comfyui_pcpo.trainers.reward_server.server import main

    with pytest.raises(UserError, match=why) as error:
        main(arguments)
    assert "\n" not in str(error.value)


def test_a_port_that_is_taken(server):
    from comfyui_pcpo.trainers.errors import UserError
    from comfyui_pcpo.trainers.reward_server.server import main

    port = server.url.rsplit(":", 1)[1]
    with pytest.raises(UserError, match=f"127.0.0.1 port {port} cannot be listened at"):
        main(["colour", "--port", port])


def test_the_client_needs_no_server_package():
    script = (
        "import sys; from comfyui_pcpo.pcpo.rewards import load_reward; load_reward('remote');"
        "print(*{'starlette', 'uvicorn', 'pydantic', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


# --- the application by itself ---------------------------------------------------------------


class Odd(BatchReward):
    """A reward of a test: fails as its prompt says, and notices when it is asked twice at once."""

    name = "odd"
    busy = 0
    most = 0

    def measure(self, images, prompts):
        Odd.busy += 1
        Odd.most = max(Odd.most, Odd.busy)
        time.sleep(0.1)
        Odd.busy -= 1
        if prompts[0] == "fail":
            raise KeyError("oops")
        if prompts[0] == "refuse":
            raise RewardUnavailable("the weights are gone; put them back")
        return Scores(images.float().mean((1, 2, 3)))


@pytest.fixture
def odd_server():
    import uvicorn
    from comfyui_pcpo.trainers.reward_server.app import Service

    config = uvicorn.Config(
        Service({"odd": Odd()}).application(), port=0, lifespan="off", log_level="critical"
    )
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.02)
    running.url = f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    yield running
    running.should_exit = True
    thread.join(10)


def test_requests_at_once_score_one_after_the_other(odd_server):
    Odd.most, found = 0, {}

    def ask(level):
        image = torch.full((1, 3, 4, 4), level, dtype=torch.uint8)
        found[level] = remote(odd_server).score(image, [""]).values.item()

    threads = [threading.Thread(target=ask, args=(level,)) for level in (10, 20, 30, 40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {level: float(level) for level in (10, 20, 30, 40)}
    assert Odd.most == 1


def test_a_reward_that_fails_on_the_server_is_reported_here(odd_server):
    with pytest.raises(RewardUnavailable, match=r"HTTP 500 \(KeyError: 'oops'\) \(2 tries\)"):
        remote(odd_server).score(noise(1, 3, 4, 4), ["fail"])
    with pytest.raises(
        RewardUnavailable, match=r"HTTP 422 \(the weights are gone; put them back\);"
    ):
        remote(odd_server).score(noise(1, 3, 4, 4), ["refuse"])
    assert remote(odd_server).score(noise(1, 3, 4, 4), [""]).values.isfinite().all()


def test_a_client_that_gave_up_is_not_scored_for(odd_server):
    calls, Odd.most = [], 0
    measure = Odd.measure
    Odd.measure = lambda self, *a: (calls.append(a), measure(self, *a))[1]
    try:
        slow = [threading.Thread(target=lambda: _give_up(odd_server)) for _ in range(4)]
        for thread in slow:
            thread.start()
        for thread in slow:
            thread.join()
        time.sleep(0.7)
    finally:
        Odd.measure = measure
    assert 1 <= len(calls) < 4


def _give_up(server):
    picture = protocol.encode_picture(Image.new("RGB", (4, 4)))
    with pytest.raises(WebError):
        Link(0.05, 9999, 0, "PCPO_REWARDS").ask(
            server.url + "/rewards/odd/score", {"images": [picture], "prompts": [""]}
        )
