"""`pcpo` by itself: the snippet of docs/library.md, and what the package exports."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfyui_pcpo
import pytest
import torch
from comfyui_pcpo import pcpo

ROOT = Path(comfyui_pcpo.__path__[0])
PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
(SNIPPET,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TABLES = [name for name in pcpo.__all__ if name.isupper()]


@pytest.fixture
def run(tmp_path) -> Callable[[str], dict[str, Any]]:
    """Runs a snippet; what it gives are the snippet's names."""

    def names(snippet: str) -> dict[str, Any]:
        (tmp_path / "snippet.py").write_text(snippet, encoding="utf-8")
        torch.manual_seed(0)
        return runpy.run_path(str(tmp_path / "snippet.py"))

    return names


def test_the_snippet_of_the_page_learns(run, capsys):
    run(SNIPPET)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [f"iteration {i}" for i in range(10)]
    rewards = [float(line.split()[-1]) for line in said]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.5


def test_on_policy_the_snippets_ratio_is_one(run):
    names = run(SNIPPET.replace("range(10)", "range(1)"))
    assert (names["log_ratio"] == 0).all() and names["log_ratio"].requires_grad
    assert all(weights.grad.abs().sum() > 0 for weights in names["network"].parameters())


@pytest.mark.parametrize("table", TABLES)
def test_a_name_means_the_same_in_a_table_and_in_the_package(table):
    for name, entry in getattr(pcpo, table).items():
        assert getattr(pcpo, name, entry) is entry
        assert getattr(pcpo, entry.__name__, entry) is entry


def test_every_exported_name_is_there():
    assert [name for name in pcpo.__all__ if not hasattr(pcpo, name)] == []


def test_every_word_of_the_page_is_exported():
    named = set(re.findall(r"`(\w+)(?:\(|`|\[)", PAGE.replace(SNIPPET, "")))
    missing = {name for name in named if not hasattr(pcpo, name)} - {"pcpo", "denoiser"}
    assert missing == set()
