"""Whatever word stands where a command takes one: status 0 to 2, a line at most, no traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from comfyui_pcpo.trainers.bench import command as bench
from comfyui_pcpo.trainers.cli import command as cli
from comfyui_pcpo.trainers.cli import sample_export, weights
from comfyui_pcpo.trainers.compare import command as compare
from comfyui_pcpo.trainers.errors import ConfigError
from comfyui_pcpo.trainers.evaluate import command as evaluation
from comfyui_pcpo.trainers.evaluate import images as evaluation_images
from comfyui_pcpo.trainers.profile import command as profile_command
from comfyui_pcpo.trainers.reward_server import server as serve
from PIL import Image

ALWAYS = {
    "long": "a red circle " * 30,
    "nul": "a\0b",
    "half a character": "a\ud800",
    "empty": "",
    "newline": "a\nb",
    "digits": "9" * 5000,
    "nested": "[" * 100_000,
    "folder": "dir",
}
NASTY = {
    **ALWAYS,
    "long path": "x/" * 3000,
    "long name": "runs/" + "x" * 300 + ".txt",
    "undecoded": "a\udcff.png",
    "blank": " ",
    "escape": "\x1b[31mred",
    "letters": "日本 \U0001f600 عربى",
    "nan": "nan",
    "negative": "-1",
    "endless": "1e999",
    "nested pairs": '{"a":' * 50_000,
    "file": "file.txt",
    "device": os.devnull,
    "link": "link",
    "above": "../../..",
    "nobody's": "~nobody-of-that-name/x",
    "option": "--out",
    "equals": "a=b=c",
    "colon": ":",
    "format": "{x} %s $x_$ \\",
    "separator": "a.b.c=",
}
DEMO = ("train", "--preset", "demo")
IMAGE = ("score", "a.png", "--reward", "jpeg_compressibility")
WORDS = [
    ("?",),
    ("train", "?"),
    ("train", "--preset", "?"),
    *((*DEMO, f"--{option}", "?") for option in ("out", "rewards", "card-gb", "num-processes")),
    (*DEMO, "--rewards", "scene", "?"),
    (*DEMO, "--rewards", "?", "1"),
    (*DEMO, "--reward-options", "?"),
    (*DEMO, "--reward-options", "scene.x=?"),
    (*DEMO, "--reward-options", "scene.weight=?"),
    (*DEMO, "--model.source", "?"),
    (*DEMO, "--model.text-encoders", "?"),
    (*DEMO, "--model.t5-tokenizer", "?"),
    (*DEMO, "--model.width", "?"),
    (*DEMO, "--prompts.source", "?"),
    (*DEMO, "--prompts.per-iteration", "?"),
    (*DEMO, "--trainable.init-lora", "?"),
    (*DEMO, "--run.publish", "?"),
    (*DEMO, "--run.publish", "?.safetensors"),
    (*DEMO, "--run.seed", "?"),
    (*DEMO, "--run.device", "?"),
    (*DEMO, "--optimizer.lr", "?"),
    (*DEMO, "--guard.reward", "?"),
    (*DEMO, "--guard.reward-options", "x=?"),
    (*DEMO, "--?", "1"),
    ("demo", "--model", "?"),
    ("resume", "?"),
    ("resume", "dir", "--iterations", "?"),
    ("resume", "dir", "--server", "?"),
    ("jobs", "?"),
    *(("jobs", what, "?") for what in ("list", "show", "stop", "sample", "delete")),
    ("compare", "?"),
    *(("compare", f"--{option}", "?") for option in ("out", "methods", "seeds", "jobs", "vary")),
    ("compare", "--vary", "optimizer.lr", "?"),
    ("compare", "--vary", "prompts.source", "?"),
    ("compare", "--report-only", "--out", "?"),
    ("evaluate", "?"),
    ("evaluate", "x=?"),
    ("evaluate", "pictures", "--model", "demo", "--prompts", "?"),
    *(("evaluate", "pictures", f"--{o}", "?") for o in ("out", "reference", "reward", "options")),
    ("paper", "?"),
    ("preference", "?"),
    ("preference", "make", "?", "dir"),
    ("preference", "make", "pictures", "pictures", "--out", "?"),
    ("preference", "count", "?", "?"),
    ("score", "?"),
    *((*IMAGE, f"--{option}", "?") for option in ("prompts", "csv", "sheet", "options", "device")),
    ("score", "a.png", "--reward", "?"),
    ("score", "a.png", "--reward", "scene:?"),
    ("rewards", "?"),
    ("rewards", "list", "?"),
    ("rewards", "get", "?"),
    ("rewards", "serve", "?"),
    *(("rewards", "serve", "scene", f"--{option}", "?") for option in ("host", "port", "options")),
    ("export", "?", "--out", "x.safetensors"),
    ("export", "dir", "--out", "?"),
    *(("weights", f"--{option}", "?") for option in ("steps", "out", "noise-level", "px")),
    *(("sample", f"--{o}", "?") for o in ("model", "lora", "prompts", "out", "latents", "seed")),
    ("sample", "--irg", "?"),
    ("sample", "--irg", "?:1"),
    ("sample", "--irg", "file.txt:?"),
    ("sample", "--vae", "?"),
    ("profile", "?"),
    ("profile", "demo", "--json", "?"),
    ("profile", "demo", "--iterations", "?"),
    ("bench", "--steps", "?"),
    ("doctor", "?"),
]


@pytest.fixture
def nothing_is_done(tmp_path, monkeypatch):
    """A folder of odd things; where a command would begin its work, it ends."""

    def begun(*_, **__):
        raise ConfigError("it would begin")

    for place, name in (
        (cli, "_tell"),
        (compare, "write_setup"),
        (profile_command, "profile"),
        (bench, "random_family"),
        (weights, "draw_credit"),
        (sample_export, "load_family"),
        (serve, "_run"),
        (evaluation, "_report"),
        (evaluation_images, "make_images"),
    ):
        monkeypatch.setattr(place, name, begun)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("PCPO_REWARDS", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("dir").mkdir()
    Path("file.txt").write_text("a red circle\n")
    Path("link").symlink_to("gone")
    Path("pictures").mkdir()
    for name in ("a.png", "pictures/a.png"):
        Image.new("RGB", (64, 64)).save(name)
    Path("pictures/prompts.json").write_text('{"a.png": "a red circle"}')


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_word(words, nothing_is_done, capsys):
    place = WORDS.index(words)
    others = list(NASTY)[len(ALWAYS) :][place % 3 :: 3]  # in turns, for the time it takes
    for name in (*ALWAYS, *others):
        nasty = NASTY[name]
        given = [word.replace("?", nasty) for word in words]
        status = cli.main(given)  # an exception is the test's own failure
        said = capsys.readouterr().err.strip().splitlines()
        said = [line for line in said if not line.startswith(("Warning", "  "))]
        assert status in (0, 1, 2), name
        assert len(said) <= 1 and len("".join(said)) < 1500, (name, said)
        assert status < 2 or said[0].startswith("pcpo"), (name, said)
