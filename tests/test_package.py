"""The package's own files agree with each other and carry nothing of the machine they came from."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import comfyui_pcpo
import pytest

ROOT = Path(comfyui_pcpo.__path__[0])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_PACKAGES = {"tests", "workflows", "docs"}

HOME = r"(?<![\w.~:/-])/(?:work|home|root|Users|mnt)/\w|[A-Z]:\\Users"
REGISTRY = r"(?i)https?://[^\s/]*(?:artifact|mirror|nexus|proxy|pypi|registry|localhost:\d+/simple)"


def tracked_files() -> list[str]:
    """What git tracks and what it would take up."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def requirements() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_requirements_are_those_of_the_project():
    listed = requirements()
    assert len(listed) == len(set(listed))
    assert listed == PROJECT["project"]["dependencies"]  # in one order, see there


def test_requirements_are_loose():
    # ComfyUI users have torch and transformers already: nothing is pinned or bounded from above
    assert not [line for line in requirements() if re.search(r"==|<|~=|@", line)]
    assert not [line for line in requirements() if line.startswith("torchaudio")]


def test_every_folder_with_code_is_a_listed_package():
    tops = [p for p in ROOT.iterdir() if p.is_dir() and p.name not in NOT_PACKAGES]
    files = [f for top in tops if not top.name.startswith(".") for f in top.rglob("*.py")]
    folders = {file.parent.relative_to(ROOT).parts for file in files}
    expected = {".".join(["comfyui_pcpo", *parts]) for parts in folders} | {"comfyui_pcpo"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_listed_package_can_be_imported():
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file()


def test_every_data_file_that_is_shipped_exists():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert any(path.is_file() for path in folder.glob(pattern)), f"{package}: {pattern}"


@pytest.mark.parametrize("pattern", [HOME, REGISTRY], ids=["absolute path", "registry"])
def test_no_trace_of_a_machine_in_the_files(pattern):
    names = tracked_files()
    if not names:
        pytest.skip("not a git checkout, or git is missing")
    found = []
    for name in names:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture or weights
        found += [f"{name}: {match.group()}" for match in re.finditer(pattern, text)]
    assert found == []


def test_no_lock_file_is_tracked():
    # a lock carries the host name of the registry that it was made from
    locks = {"uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock"}
    assert not locks & {Path(name).name for name in tracked_files()}
