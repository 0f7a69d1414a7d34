"""The pages of docs/ and the root agree with the code: what they name is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import unquote

import comfyui_pcpo
import pytest
from comfyui_pcpo.trainers.cli import command
from comfyui_pcpo.trainers.cli.weights import WeightsArguments, case_of
from comfyui_pcpo.trainers.compare.command import CompareArguments
from comfyui_pcpo.trainers.config.arguments import parse
from comfyui_pcpo.trainers.config.run_arguments import DemoArguments, TrainArguments
from comfyui_pcpo.trainers.config.sections import TrainFields
from comfyui_pcpo.trainers.config.train_config import read_preset, validate

ROOT = Path(comfyui_pcpo.__path__[0])
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
    if page.name != "CHANGELOG.md"
}
CODE = [p for part in ("pcpo", "trainers", "nodes", "tests") for p in (ROOT / part).rglob("*.py")]
SECTIONS = {
    name: set(field.annotation.model_fields) for name, field in TrainFields.model_fields.items()
}
COMMANDS = {c for text in PAGES.values() for c in re.findall(r"`pcpo weights( --[^`]*)`", text)}


@pytest.mark.parametrize("name", ["METHOD", "BASELINES"])
def test_a_section_that_the_code_cites_is_there(name):
    sections = re.findall(r"^## ([MB]\d+) ", PAGES[f"docs/{name}.md"], re.MULTILINE)
    assert sections == [f"{name[0]}{i + 1}" for i in range(len(sections))]
    cited = set()
    for file in CODE:
        for run in re.findall(
            rf"\b{name} ([MB]\d+(?:(?:,| and| to|, and) [MB]\d+)*)", file.read_text("utf-8")
        ):
            cited |= set(re.findall(r"[MB]\d+", run))
    assert cited and cited <= set(sections)


@pytest.mark.parametrize("page", PAGES)
def test_files_tests_and_links_are_there(page):
    text, folder = PAGES[page], (ROOT / page).parent
    for file, test in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        written = (ROOT / file).read_text(encoding="utf-8")
        assert not test or f"def {test}(" in written, f"{file}::{test}"
    for file in re.findall(r"`((?:pcpo|trainers|nodes|tests|docs)/[\w/]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file
    links = re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text)
    for link in links + re.findall(r'<img src="([^"]+)"', text):
        is_elsewhere = "://" in link or link.startswith("../../")  # of the repository's site
        assert is_elsewhere or (folder / unquote(link)).exists(), link


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\((\w+\.md)\)", PAGES["docs/README.md"]))
    assert listed == {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}


@pytest.mark.parametrize("page", ["docs/METHOD.md", "docs/BASELINES.md"])
def test_presets_that_are_named_are_shipped(page):
    named = re.findall(r"`((?:sd1[45]|sdxl|sd35|flux)-[\w-]+)`|--preset ([\w-]+)", PAGES[page])
    for name in filter(None, sum(named, ())):
        read_preset(name)
    assert named


@pytest.mark.parametrize("page", ["docs/METHOD.md", "docs/BASELINES.md", "docs/train.md"])
def test_fields_that_are_named_are_the_configs(page):
    named = re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)", PAGES[page])
    assert named and [f"{s}.{field}" for s, field in named if field not in SECTIONS[s]] == []
    for block in re.findall(r"```toml\n(.*?)```", PAGES[page], re.DOTALL):
        validate(tomllib.loads(block), page)


def test_the_readme_is_short():
    assert PAGES["README.md"].count("\n") <= 150


def test_every_workflow_and_no_other_is_in_its_page():
    there = {file.stem for file in (ROOT / "workflows").glob("*.json")}
    pages = (PAGES["README.md"], PAGES["docs/comfyui.md"])
    readme, page = (
        {*re.findall(r"\*((?:\d\d|(?:FLUX|SD|Z-Image)[^*]* -) [^*]+)\*", text)} for text in pages
    )
    assert page == there and readme <= there


def test_every_command_is_in_its_page():
    listed = re.findall(r"^\| `pcpo (\w+)", PAGES["docs/train.md"], re.MULTILINE)
    assert sorted(listed) == sorted(command.COMMANDS)


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_tables_of_weights_that_are_named_can_be_had(words):
    case_of(parse(WeightsArguments, shlex.split(words), "pcpo weights"))


ESTIMATED = [
    re.split(r" *\| *", row)
    for row in re.findall(
        r"^\| ((?:Z-Image|klein) \| `.*) \|$", PAGES["docs/train.md"], re.MULTILINE
    )
]


@pytest.mark.parametrize("row", ESTIMATED, ids=" ".join)
def test_the_table_of_memory_and_time_is_what_a_dry_run_says(row, capsys):
    name, base, offload, memory, cards, *times = row
    preset = {"Z-Image": "zimage-16gb", "klein": "klein-16gb"}[name]
    fitting = []
    for card in (8, 12, 16, 24):
        words = ["--preset", preset, "--dry-run", "--card-gb", str(card)]
        words += ["--model.base", base.strip("`"), "--model.offload", offload.strip("`")]
        if command.main(["train", *words]) == 0:
            fitting.append(card)
    said = capsys.readouterr().out
    first, last = re.fullmatch(r"(\d+)(?:, \d+)*(?: (?:to|and) (\d+))? GB", cards).groups()
    expected = [card for card in (8, 12, 16, 24) if int(first) <= card <= int(last)]
    assert fitting == expected
    assert float(memory.split()[0]) == pytest.approx(
        float(re.search(r"most +(\S+)", said)[1]), abs=0.06
    )
    found = re.findall(r"^  (.*) an iteration, .* on a (?:mid-range|fast)", said, re.MULTILINE)
    assert found[:2] == times and len(ESTIMATED) == 6


RUNS = {"train": TrainArguments, "demo": DemoArguments, "compare": CompareArguments}
WRITTEN = sorted(
    {
        (name, " ".join(words.split()))
        for text in PAGES.values()
        for pattern in (r"`pcpo (\w+)( --[^`]+)`", r"^(?:uv run )?pcpo (\w+)( --[^#\n]+)")
        for name, words in re.findall(pattern, text, re.MULTILINE)
        if name in RUNS and ("--preset" in words or name != "train")
        if not {"NAME", "..."} & {*words.split()}
    }
)


@pytest.mark.parametrize("name, words", WRITTEN)
def test_runs_that_are_named_can_be_asked_for(name, words):
    parse(RUNS[name], shlex.split(words), f"pcpo {name}").read()
