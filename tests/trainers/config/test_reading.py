"""Texts that may be paths, and values as people give them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfyui_pcpo.pcpo.pictures.captions import one_line
from comfyui_pcpo.trainers import reading
from comfyui_pcpo.trainers.config.train_config import read_config
from comfyui_pcpo.trainers.errors import ConfigError
from PIL import Image, ImageDraw, ImageFont

LONG = "a red circle " * 30
NO_FILES = {
    LONG: "has a name too long",
    "runs/" + "x" * 300: "has a name too long",
    "x/" * 3000: "has a name too long",
    "a\0b": "holds a NUL",
    "\ud800": "is not valid Unicode",
    "": "is empty",
    "dir": "is a folder",
    "link": "is a link to a file that is not there",
    "loop": "is a link to a file that is not there",
    os.devnull: "is a device",
    "gone": "is no file",
    "file/below": "is no file",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("dir").mkdir()
    Path("file").write_text("")
    Path("link").symlink_to("gone")
    Path("loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize("text", NO_FILES)
def test_every_text_can_be_asked_whether_it_is_a_file(text):
    assert NO_FILES[text] in str(reading.no_file(text))
    with pytest.raises(ConfigError) as error:
        reading.read_text(text, "x", 10)
    assert NO_FILES[text] in str(error.value)


@pytest.mark.parametrize(
    ("path", "is_folder", "said"),
    [
        ("", True, "--out is '', which is empty"),
        (LONG, True, "too long"),
        ("a\0", False, "NUL"),
        ("file", True, "--out is file, but file is no folder"),
        ("file/x", True, "file is no folder"),
        ("file/x", False, "file is no folder"),
        ("dir", False, "a folder; give a file"),
        ("model", True, "--out is model, the folder of a model; choose another folder"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_first(path, is_folder, said):
    Path("model").mkdir()
    Path("model/model_index.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        reading.check_target(path, "--out", is_folder=is_folder)
    assert said in str(error.value)


@pytest.mark.parametrize(("path", "is_folder"), [("new/run", True), ("dir", True), ("file", False)])
def test_a_place_that_can_be_written_to_is_left_alone(path, is_folder):
    reading.check_target(path, "--out", is_folder=is_folder)
    assert not Path("new").exists()


CONFIGS = {
    "a.toml": (b"rewards = " + b"[" * 5000, "is nested too deep"),
    "b.json": (b'{"rewards":' + b"[" * 100_000, "is nested too deep"),
    "c.toml": (b"[run]\nseed = " + b"9" * 5000, "a number of too many digits"),
    "d.json": (b'{"run": {"seed": ' + b"9" * 5000 + b"}}", "has more than 20 digits"),
    "e.json": (rb'{"prompts": {"source": "\ud800"}}', "half a character"),
    "f.json": (b'{"run": {"seed": 1}, "run": {"seed": 2}}', "'run' is given twice"),
    "g.json": (b'{"run": {"seed": 1, "seed": 1}}', "'seed' is given twice"),
    "h.toml": (b"[run]\nseed = 2020-01-01\n", "a date or a time"),
    "i.toml": (b"[rewards.scene]\noptions.x = 10:00:00\n", "a date or a time"),
    "j.toml": (b"[optimizer]\nlr = nan\n", "a number that is not finite"),
    "k.json": (b'{"optimizer": {"lr": NaN}}', "a number that is not finite"),
    "l.json": (b'{"rewards": {"scene": {"options": {"x": [1e999]}}}}', "that is not finite"),
    "m.toml": (b'extends = ["demo"]\n', "extends is ['demo'], no preset"),
    "n.toml": (b'extends = "n"\n', "extends is 'n', no preset"),
    "o.toml": (b'extends = "demo"\nrun = 3\n', "run is 3: Input should be a valid dictionary"),
    "p.json": (b"[1, 2]", "it holds no settings"),
    "q.json": (b"", "q.json is not JSON"),
    "r.toml": ("[run]\nseed = 1\n".encode("utf-16"), "not UTF-8 text (byte 0); save it as UTF-8"),
    "s.toml": (b"[run]\n\0seed = 1\n", "it holds NUL"),
    "t.toml": (b"#" * (2 << 20), "2,097,152 bytes, more than the 1,048,576"),
    "u.toml": (b"[run]\nseed = 1\nseed = 2\n", "u.toml is not TOML: Cannot overwrite"),
    "job.json": (b'{"config": {}}', "job.json is of a run; go on with it by `"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_no_reader_survived(name):
    content, said = CONFIGS[name]
    Path(name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_config(name)
    assert said in str(error.value)
    assert len(str(error.value)) < 800  # names every preset


def test_configs_with_a_byte_order_mark_and_other_line_ends():
    Path("a.JSON").write_bytes(b'\xef\xbb\xbf{"run": {"seed": 7}}')
    Path("b.toml").write_bytes(b"\xef\xbb\xbf[run]\r\nseed = 7\r\n")
    assert read_config("a.JSON").run.seed == read_config("b.toml").run.seed == 7


@pytest.mark.parametrize("word", ["[" * 100_000, "9" * 5000, "NaN", r'"\ud800"', '{"a":1,"a":1}'])
def test_values_on_the_command_line_that_are_json_but_cannot_be_used(word):
    with pytest.raises(ConfigError, match=r"^scene\.x "):
        reading.json_or_text(word, "scene.x")


@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\u2028b", "\ud800", "\U0001f600 عربى", "", "x" * 9000]
)
def test_any_text_can_be_drawn(text):
    pen = ImageDraw.Draw(Image.new("RGB", (64, 32)))
    for font in (ImageFont.load_default(12), ImageFont.load_default_imagefont()):
        line = one_line(text, font, 60)
        pen.text((0, 10), line, "red", font, anchor="lm" if hasattr(font, "path") else None)
        assert font.getlength(line) <= 60
