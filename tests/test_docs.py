"""The pages of docs/ and the root agree with the code: what they name is there."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import comfyui_pcpo
import pytest
from comfyui_pcpo.trainers.cli.weights import WeightsArguments, case_of
from comfyui_pcpo.trainers.config.arguments import parse
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
    for link in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", text):
        is_elsewhere = "://" in link or link.startswith("../../")  # of the repository's site
        assert is_elsewhere or (folder / link).exists(), link


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\((\w+\.md)\)", PAGES["docs/README.md"]))
    assert listed == {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}


@pytest.mark.parametrize("page", ["docs/METHOD.md", "docs/BASELINES.md"])
def test_presets_that_are_named_are_shipped(page):
    named = re.findall(r"`((?:sd1[45]|sd35|flux)-[\w-]+)`|--preset ([\w-]+)", PAGES[page])
    for name in filter(None, sum(named, ())):
        read_preset(name)
    assert named


@pytest.mark.parametrize("page", ["docs/METHOD.md", "docs/BASELINES.md"])
def test_fields_that_are_named_are_the_configs(page):
    named = re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)", PAGES[page])
    assert named and [f"{s}.{field}" for s, field in named if field not in SECTIONS[s]] == []
    for block in re.findall(r"```toml\n(.*?)```", PAGES[page], re.DOTALL):
        validate(tomllib.loads(block), page)


@pytest.mark.parametrize("words", sorted(COMMANDS))
def test_tables_of_weights_that_are_named_can_be_had(words):
    case_of(parse(WeightsArguments, shlex.split(words), "pcpo weights"))
