"""The rewards that ask a language model, against a server in the test that answers as one would."""

from __future__ import annotations

import base64
import io
import json
import socket
import time

import pytest
import torch
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.pretrained import recognise
from comfyui_pcpo.pcpo.remote import http as web
from comfyui_pcpo.pcpo.remote.http import WebError
from comfyui_pcpo.pcpo.rewards import RewardUnavailable, base, bert_score, load_reward
from comfyui_pcpo.pcpo.rewards import vlm_bert_score as vlm_bert_score_module
from comfyui_pcpo.pcpo.rewards.bert_score import Bert
from comfyui_pcpo.pcpo.rewards.chat import ANSWER_BYTES, text_of
from comfyui_pcpo.pcpo.rewards.vlm_judge import mark_in
from deberta_fixture import save_deberta
from http_fixture import Reply, Scripted, in_order
from PIL import Image

torch.set_num_threads(1)

MODELS = {"object": "list", "data": [{"id": "tiny-vl", "object": "model"}]}
LEVELS = [30, 60, 90, 120, 150]
USED = 2
"""DeBERTa's layer in these tests, of the tiny one."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(web, "PAUSE_S", 0.01)


def flat(level):
    return Image.new("RGB", (16, 12), (level,) * 3)


def completion(text):
    message = {"role": "assistant", "content": text}
    return {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def picture_in(asked):
    """The picture of a request."""
    url = asked.body["messages"][0]["content"][0]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))


def level_in(asked):
    return round(sum(picture_in(asked).convert("L").tobytes()) / (16 * 12))


def by_level(replies, usual=None):
    """Answers by the grey of the picture; a function or a `Reply`."""

    def answer(asked):
        if asked.path.endswith("/models"):
            return Reply(MODELS)
        reply = replies.get(level_in(asked), usual or Reply(completion("5")))
        return reply(asked) if callable(reply) else reply

    return answer


def judge(server, **options):
    return load_reward("vlm_judge", **{"url": f"{server.url}/v1", "retries": 1, **options})


def marks(answer, levels=LEVELS, **options):
    """What a judge says of grey pictures, and the server that it asked."""
    with Scripted(answer) as server:
        found = judge(server, **options).score(
            [flat(level) for level in levels], ["p"] * len(levels)
        )
    return found, server


# --- the question ----------------------------------------------------------------------------


def test_the_request_is_a_chat_completion_with_the_picture_in_it():
    found, server = marks(by_level({30: Reply(completion("7"))}), [30])
    assert found.values.tolist() == [7]
    models, asked = server.asked
    assert (models.method, models.path) == ("GET", "/v1/models")
    assert (asked.method, asked.path) == ("POST", "/v1/chat/completions")
    assert asked.body["model"] == "tiny-vl"
    assert asked.body["temperature"] == 0
    assert asked.body["max_tokens"] == 64
    picture, question = asked.body["messages"][0]["content"]
    assert question == {
        "type": "text",
        "text": 'How well does this image show "p"? Answer with one number from 0 (not at all) to '
        "10 (perfectly), and nothing else.",
    }
    assert picture["type"] == "image_url"
    buffer = io.BytesIO()
    flat(30).save(buffer, "JPEG", quality=80)
    expected = base64.b64encode(buffer.getvalue()).decode()
    assert picture["image_url"]["url"] == f"data:image/jpeg;base64,{expected}"


def test_a_png_is_the_picture_itself():
    picture = Image.effect_noise((33, 21), 80).convert("RGB")
    with Scripted(in_order(Reply(completion("1")))) as server:
        judge(server, image="png", model="m", max_tokens=9).score([picture], ["p"])
    assert picture_in(server.asked[0]).format == "PNG"
    assert picture_in(server.asked[0]).tobytes() == picture.tobytes()
    assert server.asked[0].body["max_tokens"] == 9
    assert server.asked[0].body["model"] == "m"


def test_a_tensor_is_sent_as_it_is():
    noise = torch.randint(0, 256, (2, 3, 9, 7), generator=torch.Generator().manual_seed(0))
    with Scripted(in_order(Reply(completion("1")))) as server:
        judge(server, image="png", model="m", parallel=1).score(noise.to(torch.uint8), ["p"] * 2)
    for asked, image in zip(server.asked, noise, strict=True):
        assert torch.equal(pixels_of(picture_in(asked))[0], image.to(torch.uint8))


def test_answers_go_to_their_pictures_whatever_comes_first():
    replies = {
        level: Reply(completion(str(i)), delay=0.3 - 0.05 * i) for i, level in enumerate(LEVELS)
    }
    started = time.monotonic()
    found, _ = marks(by_level(replies), parallel=5)
    assert found.values.tolist() == [0, 1, 2, 3, 4]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_requests_at_once_than_asked_for(parallel):
    now, most = [], []

    def answer(asked):
        if asked.path.endswith("/models"):
            return Reply(MODELS)
        now.append(1)
        most.append(len(now))
        time.sleep(0.05)
        now.pop()
        return Reply(completion("5"))

    marks(answer, parallel=parallel)
    assert max(most) <= parallel


def test_the_model_has_to_be_chosen_where_there_are_several():
    several = {"data": [{"id": "a"}, {"id": "b"}]}
    for said, why in (
        (several, "has a, b; set the option 'model'"),
        ({"data": []}, "names no model"),
    ):
        with Scripted(in_order(Reply(said))) as server, pytest.raises(RewardUnavailable, match=why):
            judge(server).score([flat(30)], ["p"])


def test_nothing_is_asked_before_it_is_needed():
    reward = load_reward("vlm_judge", url="http://127.0.0.1:9/v1")
    assert reward.needs_prompt
    assert reward.bounds == (0, 10)
    assert reward.modules() == []
    assert reward.complaints(["", "p"]) == [base.NO_PROMPT, None]


# --- what goes wrong -------------------------------------------------------------------------


def test_a_slow_answer_costs_that_picture_alone():
    found, _ = marks(by_level({90: Reply(completion("5"), delay=20)}), timeout_seconds=0.5)
    assert found.values.isnan().tolist() == [False, False, True, False, False]
    assert found.errors[2] == (
        "the language model gave no answer: no answer within 0.5 s (2 tries)"
    )


def test_a_slow_server_stops_the_scoring():
    with pytest.raises(RewardUnavailable, match=r"no answer within 0\.2 s") as error:
        marks(by_level({}, Reply(completion("5"), delay=20)), timeout_seconds=0.2)
    assert "\n" not in str(error.value)


def test_an_error_that_passes_is_tried_again_and_told(caplog):
    failing = in_order(Reply({"error": {"message": "overloaded"}}, 500), Reply(completion("8")))
    found, _ = marks(by_level({60: failing}))
    assert found.values.tolist() == [5, 8, 5, 5, 5]
    assert found.errors == ()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].endswith("/v1 were sent again: HTTP 500 (overloaded) (1)")


def test_an_error_that_stays_costs_that_picture_alone():
    found, server = marks(by_level({60: Reply({"error": {"message": "cuda"}}, 500)}))
    assert found.values.isnan().tolist() == [False, True, False, False, False]
    assert found.errors[1] == "the language model gave no answer: HTTP 500 (cuda) (2 tries)"
    assert len(server.asked) == 1 + 6


def test_a_server_that_fails_stops_the_scoring_in_one_sentence():
    with Scripted(by_level({}, Reply({"error": "no memory"}, 500))) as server:
        with pytest.raises(RewardUnavailable) as error:
            judge(server).score([flat(level) for level in LEVELS], ["p"] * 5)
        assert str(error.value) == (
            f"the language model server at {server.url}/v1 cannot be used: HTTP 500 (no memory) "
            "(2 tries); see that one with an OpenAI-compatible API runs there, or set the options "
            "'url' and 'model' of the reward 'vlm_judge'"
        )


def test_a_dead_server_is_not_asked_again_and_again():
    count = 24
    with Scripted(by_level({}, Reply(status=503))) as server, pytest.raises(RewardUnavailable):
        judge(server, parallel=2, retries=4).score([flat(30)] * count, ["p"] * count)
    assert len(server.asked) <= 1 + count + 2 * 4  # the first two with retries, the others without


def test_after_an_answer_retries_are_there_again():
    replies = [Reply(status=503)] * 2 + [Reply(completion("5"))]
    replies += [Reply(status=503), Reply(completion("6"))]
    with Scripted(in_order(*replies)) as server:
        reward = judge(server, model="m", parallel=1)
        found = reward.score([flat(level) for level in LEVELS[:3]], ["p"] * 3)
    assert found.values.isnan().tolist() == [True, False, False]
    assert found.values[1:].tolist() == [5, 6]


@pytest.mark.parametrize("raw", [b"<html>busy</html>", b"", b"\x80\x04\x95", b'{"choices": NaN}'])
def test_garbage_costs_that_picture_and_garbage_alone_stops(raw):
    found, _ = marks(by_level({120: Reply(raw)}))
    assert found.values.isnan().tolist() == [False, False, False, True, False]
    assert "an answer that is no JSON" in found.errors[3]
    with pytest.raises(RewardUnavailable, match="an answer that is no JSON"):
        marks(by_level({}, Reply(raw)))


@pytest.mark.parametrize(
    "said", [{}, [], {"choices": []}, {"choices": [{}]}, {"choices": [{"message": "5"}]}, "5"]
)
def test_what_is_no_completion_is_none(said):
    found, _ = marks(by_level({120: Reply(said)}))
    assert found.values.isnan().tolist() == [False, False, False, True, False]
    assert found.errors[3] == (
        "the language model gave no answer: an answer that is no chat completion"
    )


def test_an_answer_without_text_is_the_pictures_own():
    found, _ = marks(by_level({30: Reply(completion(None))}), [30])
    assert found.values.isnan().all()
    assert found.errors[0].endswith("an answer without text")


def test_an_answer_in_parts_is_joined():
    parts = [{"type": "text", "text": " 7"}, {"type": "text", "text": ".5 "}, {"type": "other"}]
    assert text_of(completion(parts)) == "7.5"
    with pytest.raises(WebError, match="without text"):
        text_of(completion(7))


def test_an_answer_has_a_largest_size():
    found, _ = marks(by_level({30: Reply(completion("5" * ANSWER_BYTES))}))
    assert "an answer of more than 1048576 bytes" in found.errors[0]
    assert found.values[1:].tolist() == [5] * 4


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    for model in ("", "m"):
        reward = load_reward("vlm_judge", url=url, model=model, retries=1)
        with pytest.raises(RewardUnavailable, match=rf"{url} cannot be used: connection refused"):
            reward.score([flat(level) for level in LEVELS], ["p"] * 5)


def test_one_bad_picture_in_a_batch():
    refused = Reply({"error": {"message": "cannot identify image"}}, 400)
    found, server = marks(by_level({90: refused}))
    assert found.values.isnan().tolist() == [False, False, True, False, False]
    expected = "the language model gave no answer: HTTP 400 (cannot identify image)"
    assert found.errors == (None, None, expected, None, None)
    assert len(server.asked) == 1 + 5


def test_pictures_that_are_all_bad_do_not_stop_the_scoring():
    found, _ = marks(by_level({}, Reply({"error": {"message": "too large"}}, 413)))
    assert found.values.isnan().all()
    assert all("HTTP 413 (too large)" in why for why in found.errors)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_stops_the_scoring(status):
    with pytest.raises(RewardUnavailable, match=f"HTTP {status} .no such model"):
        marks(by_level({}, Reply({"error": {"message": "no such model"}}, status)))


def test_a_picture_without_pixels_or_a_prompt_is_not_asked_about():
    with Scripted(by_level({})) as server:
        empty = torch.zeros(1, 3, 0, 5, dtype=torch.uint8)
        assert "no pixels" in judge(server).score(empty, ["p"]).errors[0]
        assert judge(server).score([flat(30)], [" "]).errors[0] == base.NO_PROMPT
    assert server.asked == []


def test_a_key_goes_to_the_server_of_the_environment_alone(monkeypatch):
    monkeypatch.setenv("PCPO_VLM_KEY", "secret")
    with Scripted(by_level({})) as own, Scripted(by_level({})) as other:
        monkeypatch.setenv("PCPO_VLM_URL", own.url + "/v1")
        for server in (own, other):
            judge(server).score([flat(30)], ["p"])
    assert [asked.headers.get("Authorization") for asked in own.asked] == ["Bearer secret"] * 2
    assert [asked.headers.get("Authorization") for asked in other.asked] == [None] * 2


# --- the judge -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        *(("7", 7), (" 7.5\n", 7.5), ("0", 0), ("10", 10), ("10.0", 10), (".5", 0.5), ("+3", 3)),
        *(("7/10", 7), ("7 / 10.", 7), ("10/10", 10), ("7 out of 10", 7), ("**8**", 8)),
        *(("Score: 6", 6), ("Rating (0-10): 4", 4), ("On a scale of 0 to 10: 4.25", 4.25)),
        *(
            ("I give it a 7. So: 7/10.", 7),
            ("0/10", 0),
            ("From 0 – 10, 3.", 3),
            ("(0 to 10) 10", 10),
        ),
    ],
)
def test_the_number_in_an_answer(text, mark):
    assert mark_in(text, 0, 10) == mark


@pytest.mark.parametrize(
    ("text", "why"),
    [
        *(("", "no number"), ("seven", "no number"), ("GPT4V", "no number"), ("v1.2.3", "number")),
        *(("7 or 8", "more than one number"), ("2 dogs, so 7", "more than one number")),
        *(
            ("11", "is not from 0 to 10"),
            ("-1", "is not from 0 to 10"),
            ("100", "is not from 0 to"),
        ),
        ("9" * 400, "is not from 0 to 10"),
    ],
)
def test_an_answer_without_one_number_is_none(text, why):
    with pytest.raises(ValueError, match=why):
        mark_in(text, 0, 10)


def test_other_scales():
    assert mark_in("4/5", 1, 5) == 4
    assert mark_in("1 to 5: 3", 1, 5) == 3
    assert mark_in("-0.5", -1, 1) == -0.5
    assert mark_in("Between -1 and 1: 0.5", -1, 1) == 0.5
    with pytest.raises(ValueError, match="is not from 1 to 5"):
        mark_in("0", 1, 5)


def test_an_answer_that_is_no_mark_is_an_error_of_its_picture():
    found, _ = marks(by_level({60: Reply(completion("It is\na nice picture"))}))
    assert found.values.isnan().tolist() == [False, True, False, False, False]
    assert found.errors[1] == ("the language model's answer has no number: 'It is a nice picture'")


def test_a_question_of_ones_own():
    with Scripted(by_level({}, Reply(completion("0.25")))) as server:
        reward = judge(server, question="Beauty, 0 to 1?", lowest=0, highest=1)
        assert not reward.needs_prompt
        assert reward.bounds == (0, 1)
        assert reward.score([flat(30)], [""]).values.item() == 0.25
        assert server.asked[-1].body["messages"][0]["content"][1]["text"] == "Beauty, 0 to 1?"
        assert reward.fingerprint() == {
            **{"reward": "vlm_judge", "question": "Beauty, 0 to 1?", "lowest": 0, "highest": 1},
            **{"model": "tiny-vl", "image": "jpeg", "max_tokens": 64},
        }


@pytest.mark.parametrize("prompt", ["{0} {x!r} {prompt}", "word " * 10_000, 'a "b" \\ \n é 🐈'])
def test_any_prompt_is_put_into_the_question_as_it_is(prompt):
    with Scripted(by_level({})) as server:
        judge(server, question="Is it {prompt}? 0 to 10").score([flat(30)], [prompt])
    assert server.asked[-1].body["messages"][0]["content"][1]["text"] == f"Is it {prompt}? 0 to 10"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"url": "file:///etc/passwd"}, "the url is 'file:///etc/passwd'"),
        ({"model": 3}, "model is 3"),
        ({"image": "gif"}, "image is 'gif'; choose one of jpeg, png"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"parallel": 65}, "parallel is 65; it has to be a whole number from 1 to 64"),
        ({"parallel": True}, "parallel is True"),
        ({"timeout_seconds": -1}, "timeout_seconds is -1"),
        ({"retries": 11}, "retries is 11"),
        ({"question": " "}, "question is ' '"),
        ({"lowest": 5, "highest": 5}, "lowest is 5 and highest 5"),
        ({"highest": float("inf")}, "'highest' of the reward 'vlm_judge' is inf"),
    ],
)
def test_options_that_are_none_are_refused_at_once(options, why):
    with pytest.raises(ValueError, match=why):
        load_reward("vlm_judge", **options)


# --- BERTScore of a description --------------------------------------------------------------


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    return save_deberta(tmp_path_factory.mktemp("models") / "deberta-xlarge-mnli")


@pytest.fixture
def tiny(monkeypatch):
    """The tiny DeBERTa counts as the large one, and its second layer as the 40th."""
    monkeypatch.setattr(recognise, "_DEBERTA", {})
    monkeypatch.setattr(vlm_bert_score_module, "LAYER", USED)


def described(server, folder, **options):
    options = {"url": f"{server.url}/v1", "weights": str(folder), "retries": 1, **options}
    return load_reward("vlm_bert_score", **options)


SAID = {30: "a red fox in the snow", 60: "two dogs playing chess", 90: "", 120: "a wooden table"}
PROMPTS = ["a red fox", "an astronaut", "two dogs", "a wooden table"]


def test_the_reward_is_the_recall_of_the_prompt(deberta, tiny):
    replies = {level: Reply(completion(f" {text}\n")) for level, text in SAID.items()}
    with Scripted(by_level(replies)) as server:
        reward = described(server, deberta)
        found = reward.score([flat(level) for level in SAID], PROMPTS)
    bert = Bert(deberta, "float32", "r", USED)
    references = [f"The image contains {prompt}" for prompt in PROMPTS]
    expected = bert.agreements(list(SAID.values()), references)
    assert found.values.tolist() == pytest.approx([a.recall for a in expected], abs=1e-6)
    assert found.values[2] == 0
    assert found.details[0] == pytest.approx(
        {"precision": expected[0].precision, "recall": expected[0].recall, "f1": expected[0].f1},
        abs=1e-6,
    )
    assert found.errors == ()
    question = server.asked[-1].body["messages"][0]["content"][1]["text"]
    assert question == "Answer concisely: what is going on in this image?"
    assert reward.modules() == [reward.bert.network]
    assert reward.bounds[0] <= found.values.min()
    assert found.values.max() <= reward.bounds[1]


def test_a_picture_without_a_description_has_no_reward(deberta, tiny):
    bad = Reply({"error": {"message": "bad image"}}, 400)
    with Scripted(by_level({60: bad}, Reply(completion("a red fox")))) as server:
        found = described(server, deberta).score([flat(30), flat(60)], ["a red fox"] * 2)
    assert found.values.isnan().tolist() == [False, True]
    assert found.errors == (None, "the language model gave no answer: HTTP 400 (bad image)")
    assert found.details[1] == {}


def test_a_dead_server_stops_it_too(deberta, tiny):
    with Scripted(by_level({}, Reply(status=502))) as server:
        reward = described(server, deberta)
        with pytest.raises(RewardUnavailable, match=r"HTTP 502 .* of the reward 'vlm_bert_score'"):
            reward.score([flat(30), flat(60)], ["a red fox"] * 2)


def test_its_fingerprint_names_both_models(deberta, tiny):
    with Scripted(by_level({})) as server:
        found = described(server, deberta, reference="It shows {prompt}").fingerprint()
    assert found["model"] == "tiny-vl"
    assert found["reference"] == "It shows {prompt}"
    assert found["weights"]["layer"] == USED
    assert len(found["weights"]["sha256"]["model.safetensors"]) == 64
    json.dumps(found)


def test_a_folder_is_searched_for_deberta(deberta, tiny):
    reward = load_reward("vlm_bert_score", folders=[str(deberta.parent)])
    assert reward.folder == deberta
    file = load_reward("vlm_bert_score", weights=str(deberta / "model.safetensors"))
    assert file.folder == deberta


def test_missing_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    with pytest.raises(RewardUnavailable) as error:
        load_reward("vlm_bert_score", folders=[str(tmp_path)])
    for part in (
        "deberta-xlarge-mnli",
        str(tmp_path),
        "rewards get vlm_bert_score",
        "MIT",
        "3.03 GB",
        "https",
    ):
        assert part in str(error.value), part


def test_a_smaller_deberta_is_not_the_one(deberta):
    with pytest.raises(RewardUnavailable, match="it has no tensor embeddings"):
        load_reward("vlm_bert_score", weights=str(deberta))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of float32, float16, bfloat16"),
        ({"folders": "models"}, "folders is 'models'; give a list of folders"),
        ({"question": ""}, "question is ''"),
        ({"reference": "The image"}, "reference is 'The image'; it has to have {prompt} in it"),
        ({"image": "webp"}, "image is 'webp'"),
    ],
)
def test_its_options_are_checked_before_the_weights(options, why):
    with pytest.raises(ValueError, match=why):
        load_reward("vlm_bert_score", **options)


def test_nothing_is_loaded_before_it_is_used(deberta, tiny, monkeypatch):
    def refuse(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(bert_score, "_network", refuse)
    reward = load_reward("vlm_bert_score", weights=str(deberta))
    assert reward.complaints(["", "p"]) == [base.NO_PROMPT, None]
    assert reward.needs_prompt
