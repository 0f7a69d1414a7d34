"""Installing moves nothing that is there; what is declared holds; a wheel carries every file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import comfyui_pcpo
import pytest
from comfyui_pcpo.tests.test_package import tracked_files

ROOT = Path(comfyui_pcpo.__path__[0])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
UV = shutil.which("uv")
LIGHT = ("filelock", "pillow", "pydantic", "safetensors", "tqdm", "jaxtyping")
UNPACKED = {"tests", "docs", ".ci", ".github"}
"""The folders that a wheel has nothing of."""
needs_uv = pytest.mark.skipif(UV is None, reason="uv is not installed")

COMFYUI = {  # what one had in 2025, by the names and bounds that a resolver looks at
    "torch 2.5.1": ["filelock", "jinja2"],
    "numpy 2.2.6": [],
    "pillow 11.3.0": [],
    "safetensors 0.8.0": [],  # an older one pip replaces by what the newest diffusers asks for
    "pydantic 2.11.7": [],
    "tqdm 4.67.1": [],
    "filelock 3.19.1": [],
    "jinja2 3.1.6": [],
    "packaging 25.0": [],
    "pyyaml 6.0.2": [],
    "regex 2025.9.1": [],
    "requests 2.32.5": [],
    "tokenizers 0.22.1": ["huggingface-hub>=0.16.4,<2.0"],
    "huggingface-hub 0.35.3": ["filelock", "packaging", "pyyaml", "requests", "tqdm"],
    "transformers 4.57.1": [
        "huggingface-hub>=0.34.0,<1.0",
        "tokenizers>=0.22.0,<=0.23.0",
        "safetensors>=0.4.3",
        "numpy>=1.17",
        "regex!=2019.12.17",
    ],
}
THE_REST = {
    "diffusers 0.36.0": ["huggingface-hub>=0.34.0,<2.0"],
    "accelerate 1.10.0": ["torch>=2.0.0", "huggingface-hub>=0.21.0"],
    "peft 0.18.0": ["torch>=1.13.0", "transformers", "accelerate>=0.21.0"],
    "matplotlib 3.10.0": ["numpy>=1.23"],
    "jaxtyping 0.3.0": [],
}


@pytest.fixture
def environment(tmp_path):
    """A Python in which packages are installed that a resolver knows by their metadata alone."""

    def make(packages: dict[str, list[str]], with_pip: bool = False) -> Path:
        venv.create(tmp_path / "env", with_pip=with_pip, symlinks=os.name != "nt")
        (site,) = {path.resolve() for path in (tmp_path / "env").glob("[Ll]ib*/**/site-packages")}
        for package, needed in packages.items():
            name, number = package.split()
            folder = site / f"{name.replace('-', '_')}-{number}.dist-info"
            folder.mkdir()
            lines = [
                f"Name: {name}",
                f"Version: {number}",
                *(f"Requires-Dist: {n}" for n in needed),
            ]
            (folder / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))
            (folder / "RECORD").write_text("")
            (folder / "INSTALLER").write_text("pip")
        return tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    return make


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of what git tracks and would take up, built away from this folder."""
    if find_spec("setuptools") is None or int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("there is no setuptools, or it is too old")
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        (folder / "pack" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "pack" / name)
    script = "from setuptools import build_meta as b; import sys; b.build_wheel(sys.argv[1])"
    words = [sys.executable, "-c", script, str(folder)]
    subprocess.run(words, cwd=folder / "pack", check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def fresh(folder: Path, words: list[str]) -> Path:
    """The Python of a new environment with packages, installed from outside this folder."""
    outcome([UV, "venv", "--quiet", "--python", sys.executable, "env"], folder)
    python = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    outcome([UV, "pip", "install", "--python", str(python), *words], folder)
    return python


def outcome(words: list[str], cwd: Path) -> str:
    """What a command says, on both streams."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("UV_PROJECT", "VIRTUAL_ENV"))}
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def moved(said: str, packages: dict[str, list[str]]) -> set[str]:
    """Which of the packages that are there an installer would replace."""
    names = {package.split()[0] for package in packages}
    taken = re.findall(r"^ [-~] ([\w-]+)==", said, re.MULTILINE)  # of uv
    for line in re.findall(r"Would install (.*)", said):  # of pip
        taken += [word.rsplit("-", 1)[0].replace("_", "-").lower() for word in line.split()]
    return names & set(taken)


def test_nothing_that_uv_reads_in_this_folder_constrains():
    # `uv pip install` obeys [tool.uv] of the folder that it is called in
    assert PROJECT["tool"]["uv"] == {"default-groups": ["pins"]}
    read = ("uv.toml", "pip.conf", "pip.ini", "setup.cfg", ".python-version", "constraints.txt")
    assert not [name for name in read if (ROOT / name).exists()]


def test_what_the_two_commands_run_on_is_pinned():
    pins = {re.split("=", pin)[0] for pin in PROJECT["dependency-groups"]["pins"]}
    assert pins == {"torch", "diffusers", "transformers", "peft"}


@needs_uv
def test_one_call_a_requirement_moves_nothing(environment):
    """As ComfyUI's Manager installs them: in this folder, where all that is there is old enough."""
    python = environment(COMFYUI | THE_REST)
    words = [UV, "pip", "install", "--offline", "--dry-run", "--python", str(python)]
    for line in [line for line in LINES if not line.startswith(LIGHT)]:
        assert "no changes" in outcome([*words, line], ROOT), line
    assert "no changes" in outcome([*words, "-r", "requirements.txt"], ROOT)


@needs_uv
@pytest.mark.slow  # asks a package index
def test_uv_adds_what_a_comfyui_lacks_and_moves_nothing(environment):
    words = [UV, "pip", "install", "--dry-run", "--python", str(environment(COMFYUI))]
    said = outcome([*words, "-r", "requirements.txt"], ROOT)
    assert "diffusers" in said
    assert moved(said, COMFYUI) == set()


@pytest.mark.slow  # asks a package index
def test_pip_adds_what_a_comfyui_lacks_and_moves_nothing(environment):
    words = [str(environment(COMFYUI, with_pip=True)), "-m", "pip", "install", "--dry-run"]
    said = outcome([*words, "-r", "requirements.txt"], ROOT)
    assert "diffusers" in said
    assert moved(said, COMFYUI) == set()


@pytest.mark.slow  # asks a package index
def test_the_install_script_puts_right_what_single_calls_moved(environment):
    hub, diffusers = "huggingface-hub 2.4.0", "diffusers 0.42.1"
    there = {k: v for k, v in (COMFYUI | THE_REST).items() if k.split()[0] not in hub + diffusers}
    there |= {hub: [], diffusers: ["huggingface-hub<3.0,>=1.32.0", "safetensors>=0.8.0"]}
    python = environment(there, with_pip=True)
    script = "import install; print(*install.command()[1:], '--dry-run', sep='\\n')"
    words = outcome([str(python), "-c", script], ROOT).splitlines()
    assert moved(outcome([str(python), *words], ROOT), there) == {"huggingface-hub", "diffusers"}


def test_a_wheel_has_every_file_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as packed:
        there = {name.removeprefix("comfyui_pcpo/") for name in packed.namelist()}
    files = {name for name in tracked_files() if Path(name).parts[0] not in UNPACKED}
    assert {name for name in files - there if "/" in name} == set()
    assert {"__init__.py", "py.typed", "requirements.txt"} <= there
    assert not [name for name in there if name.endswith(".pyc")]


@needs_uv
@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_is_fit_and_trains(wheel, tmp_path):
    pins = PROJECT["dependency-groups"]["pins"]
    python = fresh(tmp_path, [str(wheel), *pins])
    said = outcome([str(python.with_name("pcpo")), "doctor"], tmp_path)
    assert "fit to run" in said and "NOT" not in said
    said = outcome([str(python.with_name("pcpo")), "demo", "--run.iterations", "1"], tmp_path)
    assert "iteration 1/1" in said
    assert list(tmp_path.glob("runs/*/lora/*.safetensors"))


DRAWN = """
import asyncio, importlib.util as u, sys
sys.path.insert(0, sys.argv[1] + "/tests/fixtures")
import comfy_api_fixture as api, torch
from unittest.mock import MagicMock
for name in ("comfy", "comfy.model_management", "comfy.utils", "server"):
    sys.modules[name] = MagicMock()
spec = u.spec_from_file_location(
    "a_pack", sys.argv[1] + "/__init__.py", submodule_search_locations=[sys.argv[1]]
)
sys.modules["a_pack"] = pack = u.module_from_spec(spec)
spec.loader.exec_module(pack)
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
nodes = {api.schema_of(node).node_id: node for node in nodes}
reward = api.run(nodes["PCPOReward"], reward="brightness").result[0]
images = torch.rand(3, 32, 32, 3)
print(len(nodes), api.run(nodes["PCPOScoreImages"], images=images, reward=reward, prompt="a"))
"""


@needs_uv
@pytest.mark.slow
def test_the_lowest_versions_train_load_and_draw(tmp_path):
    python = fresh(
        tmp_path, ["--resolution", "lowest-direct", "-r", str(ROOT / "requirements.txt")]
    )
    for demo in ("tiny-flow", "tiny-sd"):
        words = ["demo", "--model", demo, "--run.iterations", "2", "--out", demo]
        said = outcome([str(python), str(ROOT / "trainers"), *words], tmp_path)
        assert "iteration 2/2" in said
    assert "NodeOutput" in outcome([str(python), "-c", DRAWN, str(ROOT)], tmp_path)
