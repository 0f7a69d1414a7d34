"""What a language has to say: the words of nodes, panel and help pages, held to the English ones.

Languages are found by their files; CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import panel_node_fixture
import pytest
import words_fixture as words
from words_fixture import ROOT, WEB

LOCALES, HELP, WORDS = ROOT / "locales", WEB / "docs", WEB / "words"
MISSING = runpy.run_path(str(ROOT / "docs" / "write_locale.py"))["missing"]
TRANSLATED = sorted(
    {file.parent.name for file in LOCALES.glob("*/*.json")} - {"en"}
    | {file.stem for file in WORDS.glob("*.json")}
    | {file.stem for file in HELP.glob("*/*.md")}
)
COMFYUI = {"zh", "zh-TW", "ja", "ko", "ru", "fr", "es", "ar", "tr", "pt-BR", "fa"}
"""Values of ComfyUI's setting Comfy.Locale."""
NAMED = re.compile(r"\{(\w+)\}")
TECHNICAL = re.compile(
    r"pcpo[\s.-].*|\d\d .*|Comfy\..*|Workspace\..*|\.?/.*|http:.*|\?user=.*|.*[:;]\S.*", re.S
)
"""Classes, keys of storage, names of templates, commands, addresses and CSS."""
OUTSIDE = {"ArrowLeft", "ArrowRight", "Escape", "Content-Type", "LoRA", "LoRA ", "pi pi-chart-line",
           "rate ", " delete", " and ", " or "}  # fmt: skip
"""Strings with letters and spaces or a capital that nobody reads, or that are names."""
SHOWN = re.compile(
    r"""(?:aria-label"\s*[:,]|\b(?:title|alt|label|yLabel|xLabel|placeholder):|textContent\s*=|button\(
    |createPart\(|(?:setText|setLine)\([\w.]+,)\s*["`](?!PCPO")[^"`]*[a-z]""",
    re.X,
)
"""Text where a reader sees or hears it."""


FILLED = re.compile(r"\$\{[^{}]*\}")
"""What a template fills in."""


def is_sentence(text: str) -> bool:
    """Whether a string looks like words for a reader."""
    text = FILLED.sub("", text)
    is_worded = re.search(r"[A-Za-z]{2,} [A-Za-z]|^ ?[A-Z][a-z]+|[a-z]{3,}[.:!?]", text)
    is_part = text.strip() != text and re.search(r"[A-Za-z]{2}", text)
    return bool(is_worded or is_part) and text not in OUTSIDE and not TECHNICAL.fullmatch(text)


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """All texts of a JSON object, with where they stand."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(part, (*path, key))
    else:
        yield path, value


def placeholders(text: str) -> set[str]:
    return set(NAMED.findall(text))


# --- English -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", words.scripts())
def test_every_sentence_is_one_literal(name):
    # no concatenation and no template: what is looked up is what is written here
    script = words.scripts()[name]
    for call in words.ANY.finditer(script):
        rest = script[call.end() - len(call[0]) :]
        known = words.CALL.match(rest) or words.PLURAL.match(rest)
        assert known or re.match(r"\w+\([\w.\[\]]+[,)]|\w+\(\w[^\"'`+]*[,)]", rest), rest[:80]


@pytest.mark.parametrize("name", words.scripts())
def test_no_sentence_escapes_translation(name):
    script = words.scripts()[name]
    assert not [text for text in words.others(script) if is_sentence(text)]
    assert not [found[0] for found in SHOWN.finditer(FILLED.sub("", script))]


def test_the_scan_sees_a_sentence_that_is_not_translated():
    script = 'button("Stop now", stop); make("p", {}, t("Pause")); x.y = `${n} images left`;'
    found = words.others(script)
    assert [text for text in found if is_sentence(text)] == ["Stop now", "${n} images left"]
    assert SHOWN.search(script)
    assert SHOWN.search('{ "aria-label": "log" }')
    assert not SHOWN.search('{ "aria-label": t("log"), title: "PCPO" }')


def test_a_plural_says_its_count():
    for many, one in words.plural_keys().items():
        assert "count" in placeholders(many)
        assert placeholders(one) <= placeholders(many)
    assert not words.single_keys() & words.plural_keys().keys()


# --- other languages ---------------------------------------------------------------------------


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_language_is_one_of_comfyuis(language):
    assert language in COMFYUI


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_language_has_all_words_of_the_panel(language, tmp_path):
    known = read(WORDS / f"{language}.json")
    assert known.keys() == words.keys()
    forms = plural_forms(language, tmp_path)
    for key, text in known.items():
        if key in words.plural_keys():
            assert (
                {*forms, "other"} <= text.keys() <= {"zero", "one", "two", "few", "many", "other"}
            )
        texts = list(text.values()) if key in words.plural_keys() else [text]
        for each in texts:
            assert each.strip(), key
            assert placeholders(each) <= placeholders(key), key
            assert key in words.plural_keys() or placeholders(each) == placeholders(key), key


def plural_forms(language: str, folder: Path) -> list[str]:
    """The forms of a language that whole numbers take."""
    body = """
        const rules = new Intl.PluralRules(a);
        return [...new Set(Array.from({ length: 201 }, (_, i) => rules.select(i)))];
    """
    return panel_node_fixture.run(folder, body, language)


@pytest.mark.parametrize("language", TRANSLATED)
@pytest.mark.parametrize("file", ["main.json", "nodeDefs.json"])
def test_a_language_has_all_words_of_the_nodes(language, file):
    english, known = dict(leaves(read(LOCALES / "en" / file))), read(LOCALES / language / file)
    found = dict(leaves(known))
    assert found.keys() == english.keys()
    for path, text in found.items():
        assert text.strip() or not english[path].strip(), path
        assert codes(text) == codes(english[path]), path


def codes(text: str) -> set[str]:
    """What a person types or reads on the screen: code and addresses."""
    return set(re.findall(r"`[^`\n]+`|https?://[\w/.:#%?=&-]+[\w/]", text, re.ASCII))


@pytest.mark.parametrize("language", TRANSLATED)
@pytest.mark.parametrize("page", sorted(file.stem for file in HELP.glob("*.md")))
def test_a_language_has_every_help_page(language, page):
    # where ComfyUI asks for it: docs/<node>/<language>.md, then docs/<node>.md
    english = (HELP / f"{page}.md").read_text("utf-8")
    found = (HELP / page / f"{language}.md").read_text("utf-8")
    assert found.startswith("# ")
    rows = [len(re.findall(r"^\|", text, re.M)) for text in (english, found)]
    assert rows[0] == rows[1]  # a setting that the page leaves out
    headings = [len(re.findall(r"^#+ ", text, re.M)) for text in (english, found)]
    assert headings[0] == headings[1]
    lacks = codes(english) - codes(found)
    assert not lacks


def test_no_file_is_of_an_unknown_language():
    for page in HELP.glob("*/*"):
        assert (HELP / f"{page.parent.name}.md").is_file(), page
        assert page.stem in TRANSLATED, page


def test_what_a_language_lacks_is_listed(tmp_path):
    known = {"Pause": "暂停", "gone": "x", "{count} votes": {"other": "{count} 票"}}
    lacks = MISSING(
        known, {"Pause", "Stop now", "{count} votes", "{count} steps"}, {"{count} steps"}
    )
    assert lacks == {"Stop now": "", "{count} steps": {"other": ""}}


# --- in the panel ------------------------------------------------------------------------------


def pseudo() -> dict[str, Any]:
    """A language in which every word is marked."""
    marked = {key: f"[{key}]" for key in words.single_keys()}
    return marked | {key: {"other": f"[{key}]"} for key in words.plural_keys()}


def test_the_panel_speaks_the_language_it_is_given(tmp_path):
    body = """
        const { setWords } = await import("./words.js");
        const job = { state: "running", iteration: 3, of: 60, eta_seconds: 600, reward: 0.5 };
        const says = () => [text.stateOf(job).label, text.progress(job), text.rewardLine(job),
          text.settings({ config: { sampler: { steps: 8 } } })];
        const english = says();
        setWords("fr", a);
        return [english, says(), text.duration(5400), text.score(0.25)];
    """
    english, french, span, score = panel_node_fixture.run(tmp_path, body, pseudo())
    assert english == ["training", "Iteration 3 of 60, about 10 min left", "Reward 0.500",
                       [["Sampler", "8 steps"]]]  # fmt: skip
    assert french[0] == "[training]"
    assert french[1].startswith("[Iteration 3 of 60, about 10")
    assert french[3] == [["[Sampler]", "[8 steps]"]]
    assert score == "0,250"
    assert "1" in span and "30" in span


def test_a_word_that_is_missing_is_english(tmp_path):
    body = """
        const w = await import("./words.js");
        w.setWords("ru", { "{count} votes": { one: "{count} голос", few: "{count} голоса",
          many: "{count} голосов", other: "{count} голоса" }, Pause: "" });
        const count = (n) => w.plural("{count} vote", "{count} votes", n);
        return [w.t("Pause"), w.t("Reward {value}", { value: 0 }),
          w.t("{open} {close}", { open: "x" }), ...[1, 2, 5, 21].map(count),
          w.plural("{count} step", "{count} steps", 1)];
    """
    assert panel_node_fixture.run(tmp_path, body) == [
        "Pause", "Reward 0", "x {close}", "1 голос", "2 голоса", "5 голосов", "21 голос", "1 step"
    ]  # fmt: skip


def server_sentences() -> list[str]:
    """What the Python side writes for the panel, made by what writes it."""
    from comfyui_pcpo.trainers.config.sections import GuardConfig
    from comfyui_pcpo.trainers.run.endings import held_out_change
    from comfyui_pcpo.trainers.run.guard.rules import Look, Rules
    from comfyui_pcpo.trainers.taste.learn import summary

    start = Look(reward=0.4, diversity=0.3, drift=0.0, second=5.0)
    found = [held_out_change(0.39, 0.79), held_out_change(float("nan"), 0.5)]
    for config in (
        GuardConfig(every=5),
        GuardConfig(every=1, patience=1, max_drift=0.1, reward="aesthetic", max_fall=0.2),
        GuardConfig(min_diversity=0.0),
    ):
        rules = Rules(config, start)
        found.append(rules.sentence)
        strikes, best = 0, None
        looks = [Look(0.5, 0.29, 0.05, 5.1), *[Look(0.9, 0.01, 0.3, 1.0)] * 4]
        for iteration, look in enumerate(looks, 1):
            verdict = rules.assess(look, iteration, strikes, best)
            strikes, best = verdict.strikes, verdict.best
            found.append(rules.describe(verdict))
    result = {"votes": 80, "random": 20, "tested": 20, "agreed": 15, "notes": [],
              "curve": [(25, 0.6), (50, 0.7), (80, 0.9)], "doubt": ""}  # fmt: skip
    return [*found, *summary({}), *summary(result), f"{found[0]}; the LoRA is in /a/b",
            "the worker was killed; resume to go on from its last checkpoint",
            "the worker ended with an error: OSError", "stopped as asked",
            "there is no job '12'; it may have been deleted"]  # fmt: skip


def test_sentences_of_the_server_are_translated_as_a_whole(tmp_path):
    body = """
        const { setWords } = await import("./words.js");
        const { told } = await import("./words_of_server.js");
        const english = a.said.map(told);
        setWords("fr", a.words);
        return [english, a.said.map(told), told("RuntimeError: a and b, or c; see d. Or e.")];
    """
    said = server_sentences()
    english, french, error = panel_node_fixture.run(
        tmp_path, body, {"said": said, "words": pseudo()}
    )
    assert english == said
    assert error == "RuntimeError: a and b, or c; see d. Or e."
    for before, after in zip(said, french, strict=True):
        while (rest := re.sub(r"\[[^\[\]]*\]", "", after)) != after:
            after = rest
        assert not re.search("[a-z]", after), (before, after)
