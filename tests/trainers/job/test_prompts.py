"""Prompt sets and prompt files: what is shipped, and what is said of what cannot be read."""

from __future__ import annotations

import subprocess
import sys

import pytest
from comfyui_pcpo.pcpo.rollout import generator_for
from comfyui_pcpo.trainers.config.sections import PromptConfig
from comfyui_pcpo.trainers.config.train_config import (
    SETS,
    ConfigError,
    TrainConfig,
    validate,
    validate_stored,
)
from comfyui_pcpo.trainers.job import prompts as p

ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")


@pytest.mark.parametrize(
    ("name", "count"), [("animals", 45), ("animals_activities", 135), ("varied", 200)]
)
def test_shipped_sets_have_their_size_and_no_duplicates(name, count):
    found = p.read_prompts(name)
    assert len(found) == len({prompt.lower() for prompt in found}) == count
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in found)


def test_every_set_that_is_named_is_shipped_and_the_reverse():
    files = {file.stem for file in p.PROMPT_SETS.glob("*.txt")}
    assert files == set(p.BUILT_IN) - {"scenes", "scenes_held_out"}
    assert all(p.read_prompts(name) for name in p.BUILT_IN)
    assert not set(p.BUILT_IN) & set(p.EXTERNAL)
    for file in p.PROMPT_SETS.glob("*.txt"):  # each says where it comes from
        assert file.read_text(encoding="utf-8").startswith("# ")


def test_animals_are_ddpos():
    animals = p.read_prompts("animals")
    assert animals[:5] == ("cat", "dog", "horse", "monkey", "rabbit")
    assert animals[-3:] == ("gorilla", "hedgehog", "kangaroo")
    assert all(animal.isalpha() and animal.islower() for animal in animals)


def test_activities_are_every_animal_with_its_article_in_every_activity():
    pairs = {
        f"{'an' if animal == 'ant' else 'a'} {animal} {activity}"
        for animal in p.read_prompts("animals")
        for activity in ACTIVITIES
    }
    assert set(p.read_prompts("animals_activities")) == pairs


def test_varied_prompts_are_short_and_long():
    lengths = sorted(len(prompt.split()) for prompt in p.read_prompts("varied"))
    assert lengths[0] <= 4 and lengths[-1] >= 12
    assert lengths[-1] <= 40  # well within CLIP's 77 tokens


@pytest.mark.parametrize("name", p.EXTERNAL)
def test_sets_that_are_not_shipped_say_file_source_and_licence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        p.read_prompts(name)
    said = str(error.value)
    assert all(part in said for part in (repr(name), *p.EXTERNAL[name], "--prompts.source FILE"))
    (tmp_path / name).write_text("a cat\n")  # the user's file of that name is read
    assert p.read_prompts(name) == ("a cat",)


def test_an_unknown_set_names_the_sets():
    with pytest.raises(ConfigError) as error:
        p.read_prompts("beasts")
    assert all(name in str(error.value) for name in ("'beasts'", *p.BUILT_IN, *p.EXTERNAL))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"\n  \n", "holds no prompt; write one per line"),
        ("empty.jsonl", b"", "holds no prompt; write one per line"),
        ("latin.txt", "a caf\xe9".encode("latin-1"), r"not UTF-8 text \(byte 5\); save it"),
        ("a.jsonl", b'{"prompt": "x"}\n\n{"text": "y"}\n', r"a\.jsonl, line 3 has no \"prompt\""),
        ("b.jsonl", b'{"prompt": "x"}\nplain\n', r"b\.jsonl, line 2 has no \"prompt\": 'plain'"),
        ("c.jsonl", b'{"prompt": 3}\n', r"c\.jsonl, line 1"),
        ("d.jsonl", b'{"prompt": "  "}\n', r"d\.jsonl, line 1"),
        ("e.jsonl", b'["prompt"]\n', r"e\.jsonl, line 1"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        p.read_prompts(str(file))
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_text_and_jsonl_files(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffa cat\r\n\r\n  a caf\xe9  \r\n# a hash\r\n".encode())
    assert p.read_prompts(str(text)) == ("a cat", "a caf\xe9", "# a hash")
    lines = tmp_path / "a.JSONL"
    lines.write_text('{"prompt": " a cat "}\n\n{"prompt": "a\\ndog", "other": 1}\n')
    assert p.read_prompts(str(lines)) == ("a cat", "a dog")


FORMATS = {
    "a.csv": ('id,Prompt\n1,a cat\n2,"a dog,\nrunning"\n3,\n', ("a cat", "a dog, running")),
    "b.csv": ("prompt;id\r\na cat;1\r\na dog\u2028;2\r\n", ("a cat", "a dog")),
    "c.tsv": ("n\tprompt\n1\ta cat, black\n", ("a cat, black",)),
    "d.json": ('["a cat", {"prompt": "a dog", "id": 2}]', ("a cat", "a dog")),
    "e.ndjson": ('{"prompt": "a cat"}\n{"prompt": "a\\tdog"}\n', ("a cat", "a dog")),
    "f.txt": ("a cat\rا قط \U0001f600\ta\n", ("a cat", "ا قط \U0001f600 a")),
    "g.prompts": ("\ufeffa  cat\n", ("a  cat",)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_what_it_is(tmp_path, name):
    content, prompts = FORMATS[name]
    (tmp_path / name).write_bytes(content.encode())
    assert p.read_prompts(str(tmp_path / name)) == prompts


REFUSED = {
    "a.csv": (b"id,text\n1,a cat\n", 'a.csv has no column "prompt" in its first line'),
    "b.csv": (b"prompt\n" + b"x" * 200_000, "b.csv, line 2 cannot be read: field larger"),
    "c.tsv": (b"", 'no column "prompt"'),
    "d.json": (b'{"000.png": "a cat"}', 'd.json is no list; write ["a red circle", ...]'),
    "e.json": (b'["a cat", 3]', 'e.json, entry 2 has no "prompt": 3'),
    "f.json": (b"[" * 100_000, "f.json is nested too deep"),
    "g.json": (b"", "holds no prompt"),
    "h.jsonl": (b'{"prompt": ' + b"[" * 100_000, "h.jsonl, line 1 is nested too deep"),
    "i.jsonl": (b'{"prompt": "x", "n": ' + b"9" * 5000 + b"}", "more than 20 digits"),
    "j.jsonl": (rb'{"prompt": "a \ud800"}', "j.jsonl, line 1 holds '\\ud800', half a character"),
    "k.jsonl": (rb'{"prompt": "a \u0000"}', "line 1 has U+0000 in the prompt 'a \\x00'"),
    "l.txt": ("a cat".encode("utf-16"), "is not UTF-8 text (byte 0); save it as UTF-8"),
    "m.txt": ("a cat".encode("utf-16-le"), "is not UTF-8 text (it holds NUL)"),
    "n.txt": (b"a \x1b[31mcat", "n.txt, line 1 has U+001B"),
    "o.txt": (b"a " * 6000, "has a prompt of 11,999 characters"),
    "p.xlsx": (b"PK", "is a .xlsx file, which is not read; save one prompt per line as .txt"),
    "q.PNG": (b"PNG", "is a .png file, which is not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_picture_could_show_is_refused_where_it_is_read(tmp_path, name):
    content, said = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        p.read_prompts(str(tmp_path / name))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words", ["a red circle " * 30, "a\0b", "a \ud800", "a.b", "cat", ""])
def test_words_may_be_as_long_as_they_like(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()  # a folder of that name is no file of prompts
    if words.isprintable():
        assert p.prompts_of(words) == (words.strip(),)
    else:
        with pytest.raises(ConfigError, match="--prompts has U"):
            p.prompts_of(words)


@pytest.mark.parametrize("words", ["gone.txt", "my prompts/gone.csv", "sheet.xlsx", "./cat"])
def test_a_file_that_is_not_there_is_no_prompt(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ConfigError, match=r"which is (no file|a folder); check the path"):
        p.prompts_of(words)


# --- held out ------------------------------------------------------------------------------------


def split_of(tmp_path, count: int, wanted: int = 16, **fields) -> p.PromptSplit:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"prompt {i}\n" for i in range(count)))
    return p.split_prompts(PromptConfig(source=str(file), **fields), wanted)


@pytest.mark.parametrize(("count", "wanted", "held"), [(5, 16, 1), (20, 16, 4), (200, 16, 16)])
def test_some_prompts_of_a_file_are_not_trained_on(tmp_path, count, wanted, held):
    found = split_of(tmp_path, count, wanted)
    assert len(found.held_out) == held and not {*found.held_out} & {*found.prompts}
    assert len(found.prompts) == count - held and len(set(found.prompts)) == count - held
    assert found.note.startswith(f"held out of training: {held} of {count} prompts, 'prompt ")
    assert found.same_as(split_of(tmp_path, count, wanted))  # the same each time
    places = [int(prompt.split()[1]) for prompt in found.held_out]
    assert places == sorted(places) and max(places) > 0.6 * (count - 1) * (held > 1)


def test_a_prompt_that_is_there_twice_is_held_out_with_its_copy(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nc\nc\nd\ne\nc\n")
    found = p.split_prompts(PromptConfig(source=str(file)), 16)
    assert found.held_out == ("c",) and found.prompts == ("a", "b", "d", "e")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_few_prompts_cannot_be_held_out_and_it_is_said(tmp_path, count):
    found = split_of(tmp_path, count)
    assert found.held_out == found.prompts and len(found.prompts) == count
    assert f"{count} prompts are too few to hold any out of training" in found.note
    assert "prompts.held_out" in found.note


def test_a_second_file_is_measured_by(tmp_path):
    other = tmp_path / "others.txt"
    other.write_text("another\nprompt 1\nthird\n")
    found = split_of(tmp_path, 9, held_out=str(other))
    assert len(found.prompts) == 9 and found.held_out == ("another", "prompt 1", "third")
    assert "of which 1 are trained on, too: 'prompt 1'" in found.note
    assert split_of(tmp_path, 9, 2, held_out=str(other)).held_out == ("another", "prompt 1")
    assert split_of(tmp_path, 9, held_out="animals").held_out == p.read_prompts("animals")[:16]
    with pytest.raises(ConfigError, match=r"prompts\.held_out is 'gone\.txt'") as error:
        split_of(tmp_path, 9, held_out="gone.txt")
    assert "prompts.source" not in str(error.value)


def test_built_in_sets_are_as_they_were(tmp_path):
    scenes = p.split_prompts(PromptConfig(), 64)
    assert scenes.prompts == p.read_prompts("scenes") and not scenes.note.count("trained on, too")
    assert scenes.held_out == p.read_prompts("scenes_held_out")[:64]
    animals = p.split_prompts(PromptConfig(source="animals"), 16)
    assert animals.prompts == p.read_prompts("animals")
    assert animals.held_out == animals.prompts[:16] and "are trained on, too" in animals.note
    assert p.split_prompts(PromptConfig(source="animals"), 0).held_out == ()
    held = p.split_prompts(PromptConfig(source="animals", held_out="split"), 16)
    assert len(held.held_out) == 9 and not {*held.held_out} & {*held.prompts}


def test_a_config_of_before_means_what_it_meant(tmp_path):
    assert set(SETS) == set(p.BUILT_IN)
    old = TrainConfig(prompts=PromptConfig(source="my.txt")).model_dump(mode="json")
    del old["prompts"]["held_out"]
    assert validate_stored(old, "job.json").prompts.held_out == "training"
    assert validate(old, "mine.toml").prompts.held_out == "auto"
    for values in ({}, {"prompts": {"source": "animals"}}):
        assert validate_stored(values, "job.json").prompts.held_out == "auto"
    with pytest.raises(ConfigError, match="prompts"):
        validate_stored({"prompts": 3}, "job.json")


def test_reading_prompts_does_not_import_torch(tmp_path):
    code = (
        "import sys; from comfyui_pcpo.trainers.job.prompts import read_prompts\n"
        "assert len(read_prompts('varied')) == 200\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_epochs_order_is_drawn_once_for_all_its_prompts(monkeypatch):
    import torch

    count, wanted = 10, 4
    orders = [
        torch.randperm(count, generator=generator_for(0, "epoch", epoch)).tolist()
        for epoch in range(2)
    ]
    draws, drawn = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: draws.append(a) or drawn(*a, **k))
    p._shuffle.cache_clear()
    config = PromptConfig(per_iteration=wanted)
    chosen = [i for number in range(5) for i in p.chosen_prompts(config, count, 0, number)]
    assert chosen == [*orders[0], *orders[1]]
    assert len(draws) == 2
