"""`pcpo score`: table, CSV, contact sheet, several rewards, pictures of any size, bad files."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
from comfyui_pcpo.pcpo.rewards import load_reward
from comfyui_pcpo.trainers.cli import score
from comfyui_pcpo.trainers.cli.command import main
from comfyui_pcpo.trainers.cli.score import visible
from comfyui_pcpo.trainers.job.files import cell
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Four pictures of three sizes and modes; the noisier, the larger as a file."""
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").save(tmp_path / "a.png")
    Image.new("L", (64, 48), 128).save(tmp_path / "b.jpg")
    Image.fromarray(noise[:40, :40, :3]).save(tmp_path / "c.webp", lossless=True)
    Image.new("P", (64, 48), 3).save(tmp_path / "d.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_a_folder_with_two_rewards(folder, capsys):
    table, sheet = folder / "out" / "scores.csv", folder / "out" / "sheet.png"
    words = ["--reward", "jpeg_incompressibility", "--reward", "jpeg_compressibility:0.5"]
    options = ["--options", "jpeg_compressibility.quality=30"]
    outputs = ["--csv", str(table), "--sheet", str(sheet)]
    assert main(["score", str(folder), *words, *options, *outputs]) == 0
    said = capsys.readouterr().out.splitlines()
    rows = rows_of(table)
    assert len(rows) == 4 and len(said) == 4 + 4  # head, means, and two files
    found = {row["file"]: row for row in rows}
    for name in ("a.png", "b.jpg", "c.webp", "d.PNG"):
        picture, row = Image.open(folder / name), found[str(folder / name)]
        large, small = (
            load_reward(reward, quality=quality).score([picture], [""]).values.item()
            for reward, quality in (("jpeg_incompressibility", 95), ("jpeg_compressibility", 30))
        )
        assert float(row["jpeg_incompressibility"]) == pytest.approx(large, abs=5e-5)
        assert float(row["jpeg_compressibility"]) == pytest.approx(small, abs=5e-5)
        assert float(row["score"]) == pytest.approx(large + 0.5 * small, abs=1e-4)
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    mean = said[5].split()
    assert float(mean[0]) == pytest.approx(sum(scores) / 4, abs=1e-4)
    assert "mean of 4 images" in said[5]
    with Image.open(sheet) as drawn:
        assert drawn.width > 256


def test_z_scores_are_of_all_images(folder, capsys):
    words = ["--reward", "jpeg_incompressibility"]
    options = ["--options", "jpeg_incompressibility.normalise=z_score"]
    assert main(["score", str(folder), *words, *options, "--csv", str(folder / "t.csv")]) == 0
    scores = np.array([float(row["score"]) for row in rows_of(folder / "t.csv")])
    assert abs(scores.mean()) < 1e-3 and scores.std() == pytest.approx(1, abs=1e-3)


def test_one_bad_file_costs_no_other(folder, capsys):
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    options = ["--reward", "jpeg_compressibility", "--csv", str(folder / "t.csv")]
    assert main(["score", str(folder), *options, "--sheet", str(folder / "s.png")]) == 1
    rows = {row["file"]: row for row in rows_of(folder / "t.csv")}
    assert len(rows) == 5
    bad = rows.pop(str(folder / "bad.png"))
    assert bad["score"] == "" and "cannot be read as an image" in bad["error"]
    assert all(row["score"] and not row["error"] for row in rows.values())
    said = capsys.readouterr().out
    assert "mean of 4 images" in said and "cannot be read as an image" in said


def test_the_prompts_beside_the_images_are_used(tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    (tmp_path / "prompts.json").write_text(json.dumps({"a.png": "a red circle"}))
    assert main(["score", str(tmp_path)]) == 0
    assert "a red circle" in capsys.readouterr().out
    (tmp_path / "prompts.json").write_text(json.dumps({}))
    assert main(["score", str(tmp_path)]) == 1
    assert "a COLOUR SHAPE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reward", "beauty"], "the reward 'beauty', which is not in this version"),
        (["--reward", "scene:much"], "'much' is no weight; write NAME:WEIGHT"),
        (["--reward", "scene", "--reward", "scene:2"], "'scene' is given twice"),
        (["--reward", "jpeg_compressibility", "--csv", "x.txt"], "--csv is 'x.txt'"),
        (["--reward", "jpeg_compressibility", "--sheet", "."], "--sheet is '.'"),
        (["--reward", "jpeg_compressibility:0"], "the weight 0"),
        ([], "needs prompts"),
        (["--prompts", "scenes_held_out"], "prompts for 4 images"),
    ],
)
def test_refused_in_one_line(folder, capsys, options, said):
    assert main(["score", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert main(["score", str(tmp_path)]) == 2
    assert "there is no image" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no such file names there")
def test_names_and_prompts_steer_no_terminal(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a\x1b]0;owned\x07\x1b[2J.png")
    (tmp_path / "prompts.json").write_text("{}")
    assert main(["score", str(tmp_path), "--reward", "brightness"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and r"a\x1b]0;owned" in said
    assert visible("a\nb\u202ec \U0001f469\u200d\U0001f52c\u3000d") == (
        r"a\nb\u202ec " + "\U0001f469\u200d\U0001f52c\u3000d"
    )


@pytest.mark.parametrize("prompt", ["=HYPERLINK(1)", "+1 cat", "-cat", "@SUM(A1)"])
def test_a_spreadsheet_takes_no_prompt_for_a_formula(tmp_path, prompt):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.png")
    (tmp_path / "prompts.json").write_text(json.dumps({"a.png": prompt}))
    options = ["--reward", "brightness:-1", "--csv", str(tmp_path / "t.csv")]
    assert main(["score", str(tmp_path), *options]) == 0
    [row] = rows_of(tmp_path / "t.csv")
    assert row["prompt"] == f"'{prompt}" and row["score"] == "-1.0000"
    assert [*map(cell, ["x", prompt, -1.5, None])] == ["x", f"'{prompt}", -1.5, None]


def test_large_pictures_are_read_few_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(score, "PIXELS", 64 * 48 + 40 * 40)
    (folder / "e.png").write_bytes(b"")
    files = [folder / name for name in ("a.png", "b.jpg", "c.webp", "d.PNG", "e.png")]
    assert [[file.name for file in files[some]] for some in score._batches(files)] == [
        *(["a.png"], ["b.jpg", "c.webp"], ["d.PNG", "e.png"]),
    ]
    assert [len(range(20)[some]) for some in score._batches(files[4:] * 20)] == [16, 4]
