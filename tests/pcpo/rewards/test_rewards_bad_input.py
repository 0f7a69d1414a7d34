"""What no reward may stumble over: strange images and prompts, for all that need no weights."""

from __future__ import annotations

import pytest
import torch
from comfyui_pcpo.pcpo.pretrained import recognise
from comfyui_pcpo.pcpo.remote import http as web
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.pcpo.rewards import vlm_bert_score as vlm_bert_score_module
from deberta_fixture import save_deberta
from http_fixture import Reply, Scripted
from PIL import Image

torch.set_num_threads(1)

ANALYTIC = ["brightness", "colour", "colourfulness", "sharpness", "symmetry"]
NAMES = [*ANALYTIC, "ocr", "vlm_judge", "vlm_bert_score", "remote"]
PROMPT = 'a red sign that says "open"'
LONG = "word " * 10_000 + PROMPT  # about 10,000 tokens of any tokenizer
DESCRIPTION = {"needs_prompt": True, "bounds": [0, None], "fingerprint": {}}


def answer(asked):
    """A language model that always says 5, and a reward server that always gives 0.5."""
    path, count = asked.path, len(asked.body.get("prompts", ())) if asked.body else 0
    limits = {"batch": 64, "request_bytes": 1 << 26}
    replies = {
        "/health": {"version": 1, "rewards": ["any"], "limits": limits},
        "/rewards/any": DESCRIPTION,
        "/rewards/any/complaints": {"complaints": [None] * count},
        "/rewards/any/score": {"values": [0.5] * count},
        "/v1/chat/completions": {"choices": [{"message": {"content": "5"}}]},
    }
    return Reply(replies[path])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A maker of each reward, with a server and a tiny DeBERTa where it needs them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(recognise, "_DEBERTA", {})
    patch.setattr(vlm_bert_score_module, "LAYER", 2)
    patch.setattr(web, "PAUSE_S", 0.01)
    folder = save_deberta(tmp_path_factory.mktemp("models") / "deberta-xlarge-mnli")
    rewards = {}
    with Scripted(answer) as server:
        asks = {"url": f"{server.url}/v1", "model": "m"}
        options = {
            "vlm_judge": asks,
            "vlm_bert_score": {**asks, "weights": str(folder)},
            "remote": {"url": server.url},
        }

        def make(name):
            if name not in rewards:
                rewards[name] = load_reward(name, **options.get(name, {}))
            return rewards[name]

        yield make
    patch.undo()


@pytest.fixture(params=NAMES)
def reward(request, made):
    return made(request.param)


def picture(size=(48, 40), mode="RGB"):
    return Image.effect_noise(size, 60).convert(mode)


def test_no_images_have_no_scores(reward):
    found = reward.score([], [])
    assert found.values.shape == (0,)
    assert found.errors == ()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_image_without_pixels_is_an_error_of_its_own(reward, shape):
    empty = Image.new("RGB", shape[::-1])
    found = reward.score([picture(), empty, picture()], [PROMPT] * 3)
    assert found.values.isnan().tolist() == [False, True, False]
    assert found.errors[1] == f"the image has no pixels ({shape[1]}x{shape[0]})"
    tensors = reward.score(torch.zeros(2, 3, *shape, dtype=torch.uint8), [PROMPT] * 2)
    assert tensors.values.isnan().all()
    assert tensors.errors == (f"the image has no pixels ({shape[1]}x{shape[0]})",) * 2


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 1), (3, 3)])
def test_a_tiny_image_has_a_score_or_a_reason(reward, size):
    found = reward.score([picture(size), picture()], [PROMPT] * 2)
    assert found.values[1].isfinite()
    assert found.values[0].isfinite() or found.errors[0]
    assert not (found.values[0].isfinite() and found.errors and found.errors[0])


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_any_kind_of_picture_is_taken(reward, mode):
    base = picture(mode="L" if mode == "I;16" else "RGB")
    found = reward.score([base.convert(mode)], [PROMPT])
    assert found.values.isfinite().all()


@pytest.mark.parametrize("prompt", ["", "   ", "\n\t"])
def test_an_empty_prompt_is_an_error_where_one_is_needed(made, prompt):
    for name in NAMES[:-1]:  # a server judges for itself
        reward = made(name)
        found = reward.score([picture(), picture()], [prompt, PROMPT])
        assert found.values[1].isfinite()
        assert bool(found.values[0].isnan()) == reward.needs_prompt, name
        assert bool(found.errors) == reward.needs_prompt
        assert (reward.complaints([prompt])[0] is not None) == reward.needs_prompt


def test_a_prompt_of_ten_thousand_tokens_is_taken(reward):
    found = reward.score([picture()], [LONG])
    assert found.values.isfinite().all()
    assert not found.errors


@pytest.mark.parametrize(
    "prompt", ['"🐈‍⬛" red', 'red "\x00\x1b[31m"', 'red "‮desrever"', 'red "\ud800"']
)
def test_odd_letters_are_taken(reward, prompt):
    found = reward.score([picture()], [prompt])
    assert found.values.isfinite().all() or found.errors[0]


def test_there_is_a_prompt_for_each_image(reward):
    with pytest.raises(ValueError, match="there are 1 prompts for 2 images"):
        reward.score([picture(), picture()], [PROMPT])


@pytest.mark.parametrize("name", ANALYTIC)
def test_pixels_that_are_no_numbers_give_none(name):
    pixels = torch.rand(2, 3, 6, 6)
    pixels[0, 1, 2, 3] = float("nan")
    found = load_reward(name).value(pixels, ["red"] * 2)
    assert found.isnan().tolist() == [True, False]
