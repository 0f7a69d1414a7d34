"""`pcpo preference`: a page that gives nothing away, and its choices counted."""

from __future__ import annotations

import base64
import io
import json

import pytest
from comfyui_pcpo.trainers.cli.command import main
from evaluation_fixture import picture_folder
from PIL import Image


@pytest.fixture
def page(tmp_path):
    """A page of ten pairs; the second side's images are the brighter ones."""
    prompts = [f"prompt {i}" for i in range(5)]
    dark = picture_folder(tmp_path / "darkside", {p: [20, 30] for p in prompts})
    bright = picture_folder(tmp_path / "brightside", {p: [220, 230] for p in prompts})
    out = tmp_path / "page"
    assert main(["preference", "make", str(dark), str(bright), "--out", str(out)]) == 0
    return out


def data_of(page):
    text = (page / "page.html").read_text(encoding="utf-8")
    return text, json.loads(text.split('id="data">')[1].split("</script>")[0])


def grey_of(source):
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as opened:
        assert not opened.info
        return opened.getpixel((0, 0))[0]


def choices(page, chosen):
    key = json.loads((page / "key.json").read_text())
    file = page.parent / f"choices{len(list(page.parent.glob('choices*')))}.json"
    file.write_text(json.dumps({"page": key["page"], "choices": chosen}))
    return str(file)


def test_the_page_does_not_say_which_is_which(page):
    text, data = data_of(page)
    key = json.loads((page / "key.json").read_text())
    assert "darkside" not in text and "brightside" not in text and "0000.png" not in text
    assert len(data["pairs"]) == 10 == len(key["pairs"])
    assert len({(pair["prompt"], pair["image"]) for pair in key["pairs"]}) == 10
    for shown, kept in zip(data["pairs"], key["pairs"], strict=True):
        assert shown["prompt"] == kept["prompt"]
        greys = [grey_of(source) for source in shown["images"]]
        assert [grey > 128 for grey in greys] == [
            kept[place] == "brightside" for place in ("left", "right")
        ]
    sides = {pair["left"] for pair in key["pairs"]}
    assert sides == {"darkside", "brightside"}  # neither is always on one side


def test_choices_are_counted(page, capsys):
    pairs = json.loads((page / "key.json").read_text())["pairs"]
    bright = {
        str(i): "left" if pair["left"] == "brightside" else "right" for i, pair in enumerate(pairs)
    }
    other = {"0": "right" if bright["0"] == "left" else "left", "1": "tie"}
    capsys.readouterr()
    assert (
        main(["preference", "count", str(page), choices(page, bright), choices(page, other)]) == 0
    )
    said = capsys.readouterr().out
    assert "brightside against darkside: 10 won, 1 lost, 1 equal" in said
    found = json.loads((page / "win_rate.json").read_text())
    assert found["rate"] == pytest.approx(10.5 / 12)
    assert 0.5 < found["low"] < found["rate"] < found["high"] < 1
    assert found["people"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"page": "other", "choices": {"0": "left"}}', "is of another page"),
        ("nothing", "holds no choices"),
        ('{"page": "PAGE", "choices": {"99": "left"}}', "is no choice of this page"),
        ('{"page": "PAGE", "choices": {"0": "up"}}', "is no choice of this page"),
        ('{"page": "PAGE", "choices": {}}', "there is no choice"),
    ],
)
def test_other_files_are_refused(page, tmp_path, capsys, text, said):
    key = json.loads((page / "key.json").read_text())
    file = tmp_path / "file.json"
    file.write_text(text.replace("PAGE", key["page"]))
    assert main(["preference", "count", str(page), str(file)]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1


def test_a_page_is_not_written_over(page, tmp_path, capsys):
    words = [str(tmp_path / "darkside"), str(tmp_path / "brightside"), "--out", str(page)]
    assert main(["preference", "make", *words]) == 2
    assert "holds a page already" in capsys.readouterr().err
