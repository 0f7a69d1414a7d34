"""The layers: arrows go down only, and the boundary to ComfyUI's process imports no torch."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(f for part in ("pcpo", "trainers", "nodes") for f in (ROOT / part).rglob("*.py"))
HOST = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution"}
TRAINING = {"diffusers", "peft", "accelerate", "tyro", "pydantic", "tqdm", "matplotlib"}
IMAGES = {"PIL", "transformers"}  # of pcpo: for rewards alone
LIGHT = {"config", "job", "launch", "errors"}  # of trainers: no torch


def imports(file: Path) -> list[tuple[str, bool]]:
    """(dotted name from the repository's root, whether it is our own) of every import."""
    found = []
    folder = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(".".join([*base, name]), True) for name in names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", False))
    return found


def is_allowed(file: Path, name: str, ours: bool) -> bool:
    part, stem = file.relative_to(ROOT).parts[0], file.stem
    top, second = [*name.split("."), ""][:2]
    if ours:
        below = {"pcpo": {"pcpo"}, "trainers": {"pcpo", "trainers"}}
        if part != "nodes":
            return top in below[part]
        return top != "trainers" or second in LIGHT
    if top == "comfyui_pcpo":
        return False  # relative imports only: the folder may have any name
    if part == "trainers" and stem in LIGHT and top in {"torch", "diffusers"}:
        return False
    if part == "pcpo" and (top in TRAINING or (top in IMAGES and "rewards" not in file.parts)):
        return False
    return part == "nodes" or top not in HOST


def faults(file: Path) -> list[str]:
    return [name for name, ours in imports(file) if not is_allowed(file, name, ours)]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_layers(file):
    assert faults(file) == []


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_sizes(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.end_lineno - node.lineno + 1
            said = ast.get_docstring(node)
            length = body - (len(said.splitlines()) + 2 if said else 0)
            assert length <= 75, f"{node.name} has {length} lines"


def test_the_check_sees_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    bad = tmp_path / "pcpo" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("import diffusers\nfrom ..trainers import loop\nimport comfy.sd\n")
    assert len(faults(bad)) == 3


def test_requirements_equal_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines == project["dependencies"]


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {f.parent.relative_to(ROOT) for f in FILES}
    assert {"comfyui_pcpo." + ".".join(f.parts) for f in folders} | {"comfyui_pcpo"} == set(listed)
