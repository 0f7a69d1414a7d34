"""The text reward: RapidOCR for real on rendered words, without a network, and its arithmetic."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from comfyui_pcpo.pcpo.pictures.tensors import pixels_of
from comfyui_pcpo.pcpo.rewards import RewardUnavailable, base, load_reward, ocr
from comfyui_pcpo.pcpo.rewards.text_match import (
    edit_distance,
    edit_score,
    exact_score,
    quoted_text,
    word_f1,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein

torch.set_num_threads(1)

INK, PAPER = (20, 20, 20), (245, 240, 230)


def page(*lines, width=256, height=None, share=0.85, ink=INK, paper=PAPER):
    """A picture with lines of text in Pillow's own font, as large as fits a share of the width."""
    height = height or width
    size = min(width, height // max(1, len(lines)))
    while max((_length(line, size) for line in lines), default=0) > share * width:
        size -= 1
    picture = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        place = (width / 2, height * (i + 0.5) / len(lines))
        pen.text(place, line, fill=ink, font=ImageFont.load_default(size), anchor="mm")
    return picture


def _length(text, size):
    return ImageFont.load_default(size).getlength(text)


@pytest.fixture(scope="module")
def reward():
    return load_reward("ocr")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a reward must not open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# --- for real --------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [64, 96, 128, 256, 512])
def test_words_are_read_at_every_size(reward, width):
    words = ["Hello", "OPEN", "stop", "CAFE 24"]
    found = reward.score([page(w, width=width) for w in words], [f'a sign "{w}"' for w in words])
    assert found.values.tolist() == [1.0] * 4
    assert found.errors == ()
    assert [set(detail) for detail in found.details] == [{"edit", "exact", "word_f1"}] * 4


def test_a_wrong_word_gets_the_share_that_is_right(reward):
    found = reward.score([page("Hallo"), page("Hello"), page("Bonk")], ['"Hello"'] * 3)
    assert found.values.tolist() == pytest.approx([0.8, 1.0, 0.0])


def test_a_picture_without_text_is_worth_nothing_and_is_no_error(reward):
    noise = Image.frombytes("RGB", (128, 128), _noise(128 * 128 * 3))
    found = reward.score([Image.new("RGB", (128, 128), PAPER), noise], ['"Hello"'] * 2)
    assert found.values.tolist() == [0, 0]
    assert found.errors == ()


def _noise(count):
    drawn = torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.uint8).numpy().tobytes()


def test_lines_are_joined_from_top_to_bottom(reward):
    picture = page("FRESH", "BREAD", "DAILY")
    assert reward.read(picture) == ("FRESH", "BREAD", "DAILY")
    assert reward.score([picture], ['"fresh bread daily"']).values.item() == 1
    assert reward.score([picture], ['"bread daily"']).values.item() == 1
    assert reward.score([picture], ['"daily fresh bread"']).values.item() < 1


def test_case_and_white_space_do_not_count(reward):
    found = reward.score([page("OPEN 24"), page("open24")], ['"Open 24"', '"OPEN  2 4"'])
    assert found.values.tolist() == [1, 1]


def test_punctuation_counts(reward):
    found = reward.score([page("Stop"), page("Stop!")], ['"Stop!"'] * 2)
    assert found.values.tolist() == pytest.approx([0.8, 1.0])


def test_the_engine_is_given_pictures_in_rgb(monkeypatch):
    # it takes an array for BGR
    seen = []

    class Engine:
        txts = None

        def __call__(self, picture):
            seen.append(picture)
            return self

    monkeypatch.setattr("rapidocr.RapidOCR", lambda params: Engine())
    load_reward("ocr").score([page("Hello", ink=(255, 0, 0))], ['"Hello"'])
    assert [(type(p), p.mode, p.getpixel((0, 0))) for p in seen] == [(Image.Image, "RGB", PAPER)]


def test_text_upside_down_is_not_turned(reward):
    # Flow-GRPO switches the detection of the direction off
    found = reward.score([page("Hello").rotate(180)], ['"Hello"'])
    assert found.values.item() < 1


def test_grey_alpha_and_tensors(reward):
    picture = page("Hello", width=128)
    for other in (picture.convert("L"), picture.convert("RGBA"), picture.convert("P")):
        assert reward.score([other], ['"Hello"']).values.item() == 1
    assert reward.score(pixels_of(picture), ['"Hello"']).values.item() == 1


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2), (31, 31), (2000, 40)])
def test_small_and_narrow_pictures(reward, size):
    found = reward.score([Image.new("RGB", size, PAPER)], ['"Hello"'])
    assert found.values.item() == 0 or (found.values.isnan().all() and found.errors[0])


def test_one_unreadable_picture_costs_that_picture_alone(monkeypatch):
    reward = load_reward("ocr")
    read = ocr.Ocr.read

    def fails_on_black(self, picture):
        if picture.getextrema() == ((0, 0),) * 3:
            raise RuntimeError("out of memory")
        return read(self, picture)

    monkeypatch.setattr(ocr.Ocr, "read", fails_on_black)
    pictures = [page("Hello"), Image.new("RGB", (256, 256)), page("Hello")]
    found = reward.score(pictures, ['"Hello"'] * 3)
    assert found.values[[0, 2]].tolist() == [1, 1]
    assert found.values[1].isnan()
    assert found.errors == (None, "the text could not be read: RuntimeError: out of memory", None)


def test_the_order_of_threads_does_not_show(reward):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    pictures = [page(word, width=128) for word in words]
    assert reward.score(pictures, [f'"{word}"' for word in words]).values.tolist() == [1] * 8


@pytest.mark.parametrize(
    ("mode", "prompt", "expected"),
    [
        ("edit", '"Fresh Bread"', 1.0),
        ("exact", '"Fresh Bread"', 0.0),
        ("exact", '"fresh bread daily"', 1.0),
        ("word_f1", '"fresh bread"', 0.8),
        ("word_f1", '"daily, bread & fresh!"', 1.0),
        ("word_f1", '"other words"', 0.0),
    ],
)
def test_modes(mode, prompt, expected):
    picture = page("FRESH", "BREAD", "DAILY")
    found = load_reward("ocr", mode=mode).score([picture], [prompt])
    assert found.values.item() == pytest.approx(expected)
    assert found.details[0][mode] == pytest.approx(expected)


def test_a_target_of_the_options_needs_no_prompt():
    reward = load_reward("ocr", target="Hello")
    assert not reward.needs_prompt
    assert reward.complaints(["", "no quotes"]) == [None, None]
    assert reward.score([page("Hello"), page("Bonk")], ["", '"Bonk"']).values.tolist() == [1, 0]


# --- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "Open"', "Open"),
        ('"first" and "second"', "first"),
        ("a sign “Open” by night", "Open"),
        ('mixed “curly” and "straight"', "curly"),
        ('  " padded " ', " padded "),
        ("", None),
        ("no quotes", None),
        ("'single'", None),
        ('a 5" nail', None),
        ('empty ""', None),
        ('blank "  "', None),
        ("“unclosed", None),
        ('"' + "word " * 10_000 + '"', "word " * 10_000),
    ],
)
def test_the_text_that_a_prompt_quotes(reward, prompt, text):
    assert quoted_text(prompt) == text
    assert (reward.complaints([prompt])[0] is None) == (text is not None)


def test_quotes_without_an_end_take_no_time():
    started = time.process_time()
    assert quoted_text("“" * 100_000) is None
    assert time.process_time() - started < 3


def test_a_prompt_without_quotes_is_no_reward_and_says_why(reward):
    found = reward.score([page("Hello"), page("Hello")], ["a sign", '"Hello"'])
    assert found.values[0].isnan()
    assert found.values[1] == 1
    assert "quotes no text" in found.errors[0]
    assert reward.needs_prompt


# --- arithmetic ------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("abcAB ä!🐈"), max_size=12)
TARGET = TEXT.filter(str.strip)


@settings(deadline=None, max_examples=300)
@given(TEXT, TEXT)
def test_edit_distance_is_levenshteins(first, second):
    assert edit_distance(first, second) == Levenshtein.distance(first, second)


@settings(deadline=None)
@given(TEXT, TARGET)
def test_the_edit_score_is_flow_grpos(read, target):
    read_, target_ = (text.replace(" ", "").lower() for text in (read, target))
    distance = min(0 if target_ in read_ else Levenshtein.distance(read_, target_), len(target_))
    assert edit_score(read, target) == pytest.approx(1 - distance / len(target_))


@settings(deadline=None)
@given(TEXT, TARGET)
def test_scores_are_shares_and_one_for_the_text_itself(read, target):
    for score in (edit_score, exact_score, word_f1):
        assert 0 <= score(read, target) <= 1
        assert score(target, target) == 1


def test_word_f1_counts_a_word_as_often_as_it_occurs():
    read, target = "a a b", "a b b c"
    common = (Counter(read.split()) & Counter(target.split())).total()
    assert common == 2
    assert word_f1(read, target) == pytest.approx(2 * 2 / 7)


def test_long_texts_take_no_time():
    assert edit_distance("ab" * 5_000, "ba" * 5_000) == 2


# --- options, package, fingerprint -----------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mode": "fuzzy"}, "mode is 'fuzzy'; choose one of edit, exact, word_f1"),
        ({"target": ""}, "target is ''; give the text"),
        ({"target": "  "}, "target is '  '; give the text"),
        ({"target": 5}, "target is 5; give the text"),
        ({"side": 10}, "side is 10; it has to be a whole number from 64 to 4096"),
        ({"side": True}, "side is True"),
        ({"side": 320.5}, "side is 320.5"),
    ],
)
def test_options_that_are_none_are_refused_at_once(options, why):
    with pytest.raises(ValueError, match=why):
        load_reward("ocr", **options)


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
    find = base.find_spec
    monkeypatch.setattr(base, "find_spec", lambda name: None if name == package else find(name))
    expected = rf"reward 'ocr' needs the package '{package}'.*pip install .*{package}.*`"
    with pytest.raises(RewardUnavailable, match=expected):
        load_reward("ocr")


def test_missing_networks_are_named(monkeypatch):
    monkeypatch.setitem(ocr.NETWORKS, "Det.model_path", "no_such_*.onnx")
    with pytest.raises(
        RewardUnavailable, match=r"'rapidocr' has no no_such_\*.onnx in .*reinstall"
    ):
        load_reward("ocr")


def test_the_fingerprint_names_engine_networks_and_options(reward):
    found = reward.fingerprint()
    assert found["versions"]["rapidocr"] != "missing"
    assert sorted(found["sha256"]) == ["PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"]
    assert all(len(digest) == 64 for digest in found["sha256"].values())
    assert load_reward("ocr", side=640).fingerprint() != found


def test_nothing_is_loaded_before_it_is_used():
    script = (
        "import sys; from comfyui_pcpo.pcpo.rewards import load_reward\n"
        "load_reward('ocr').complaints(['x'])\n"
        "print(*{'rapidocr', 'onnxruntime', 'cv2', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_nothing_is_said_on_the_way(caplog):
    reward, engines_log = load_reward("ocr"), logging.getLogger("RapidOCR")
    engines_log.addHandler(caplog.handler)
    try:
        reward.score([Image.new("RGB", (64, 64), PAPER)], ['"Hello"'])
    finally:
        engines_log.removeHandler(caplog.handler)
    assert not caplog.records
