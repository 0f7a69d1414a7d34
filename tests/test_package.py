"""The package's own files agree with each other and carry nothing of the machine they came from."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import comfyui_pcpo
import pytest
from PIL import Image

ROOT = Path(comfyui_pcpo.__path__[0])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_PACKAGES = {"tests", "workflows", "subgraphs", "docs"}
PARTS = {"locales", "nodes", "pcpo", "subgraphs", "trainers", "workflows"}
"""Folders that a ComfyUI reads."""

HOME = r"(?<![\w.~:/-])/(?:work|home|root|Users|mnt)/\w|[A-Z]:\\Users"
REGISTRY = r"(?i)https?://[^\s/]*(?:artifact|mirror|nexus|proxy|pypi|registry|localhost:\d+/simple)"


def tracked_files() -> list[str]:
    """What git tracks and what it would take up."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, or git is missing")
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
    code = [Path(name) for name in tracked_files() if name.endswith(".py")]
    folders = {file.parent.parts for file in code if file.parts[0] not in NOT_PACKAGES}
    expected = {".".join(["comfyui_pcpo", *parts]) for parts in folders} | {"comfyui_pcpo"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == expected


def test_the_packages_say_that_they_are_typed():
    assert (ROOT / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["comfyui_pcpo"]


def test_every_listed_package_can_be_imported():
    for name in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file()


@pytest.mark.parametrize("name", ["__init__.py", "trainers/__main__.py", "install.py"])
def test_an_older_python_can_read_what_tells_it(name):
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 10))


def test_an_older_python_is_told_in_one_sentence():
    script = (
        "import runpy, sys; sys.version_info, sys.version = (3, 10, 13), '3.10.13 (main)'\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    words = [sys.executable, "-c", script, str(ROOT / "trainers" / "__main__.py")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"pcpo: .*3\.11 or newer.* 3\.10\.13; .*\n", done.stderr)


def test_a_torch_without_split_tensors_will_do():
    # 2.4 has `torch.distributed.tensor` under another name, builds without NCCL have none
    script = (
        "import sys; sys.modules['torch.distributed.tensor'] = None\n"
        "import comfyui_pcpo.trainers.distributed.sharding as s, torch\n"
        "print(s.local(torch.ones(1)).item())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


@pytest.mark.parametrize("pattern", [HOME, REGISTRY], ids=["absolute path", "registry"])
def test_no_trace_of_a_machine_in_the_files(pattern):
    found = []
    for name in tracked_files():
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


@pytest.mark.parametrize("form", ["bug_report", "feature_request"])
def test_a_form_for_issues_is_one(form):
    # what GitHub asks of a form; one that it cannot read is not offered
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text(encoding="utf-8")
    read = pytest.importorskip("yaml").safe_load(text)
    assert {"name", "description", "body"} <= read.keys()
    asked = [part for part in read["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    for named in ([part["id"] for part in asked], [part["attributes"]["label"] for part in asked]):
        assert len(set(named)) == len(asked)
    assert form != "bug_report" or {"doctor", "comfyui"} <= {part["id"] for part in asked}


def test_files_that_are_not_fast_are_there(pytestconfig):
    plugins = pytestconfig.pluginmanager.get_plugins()
    (names,) = [plugin.THOROUGH.split() for plugin in plugins if hasattr(plugin, "THOROUGH")]
    there = {file.stem for file in (ROOT / "tests").rglob("test_*.py")}
    assert not {f"test_{name}" for name in names} - there


def test_the_registry_of_nodes_takes_the_pack():
    # as `comfy node validate` reads it; https://docs.comfy.org/registry/specifications
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert {"Repository", "Documentation", "Issues", "Bug Tracker"} <= set(project["urls"])
    assert {"Operating System :: OS Independent", "Environment :: GPU :: NVIDIA CUDA"} <= set(
        project["classifiers"]
    )
    for name, fits in (
        ("Icon", lambda w, h: w == h <= 400),
        ("Banner", lambda w, h: 9 * w == 21 * h),
    ):
        address = comfy[name]
        assert address.startswith(
            project["urls"]["Repository"].replace("github", "raw.githubusercontent")
        )
        with Image.open(ROOT / "docs" / address.rpartition("/docs/")[2]) as picture:
            assert fits(*picture.size)


def test_the_published_archive_holds_what_runs_and_no_more():
    tracked = set(tracked_files())
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--ignored",
        "--exclude-from=.comfyignore",
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    published = tracked - set(listed.stdout.splitlines())
    needed = {name for name in tracked if name.partition("/")[0] in PARTS}
    assert needed <= published
    assert {name.partition("/")[0] for name in published - needed} == {
        *("CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "install.py", "pyproject.toml"),
        *("py.typed", "registry.py", "remedies.py", "requirements.txt"),
    }
