"""Every command that a message tells a user to run works where the message is read."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import comfyui_pcpo
import pytest
from comfyui_pcpo import remedies
from comfyui_pcpo.pcpo.rewards import RewardUnavailable, base, load_reward
from comfyui_pcpo.tests.test_package import tracked_files

ROOT = Path(comfyui_pcpo.__path__[0])
FILES = [f for f in tracked_files() if f.endswith(".py") and f.startswith(("pcpo", "tr", "nodes"))]
BY_HAND = re.compile(r"`(?:uv run )?pcpo [a-z]|pip install|comfyui-pcpo\[|python -m ")
PACKAGES = ("rapidocr", "onnxruntime", "starlette", "uvicorn")
"""What is installed by a name that is no literal."""


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def literals(file: str) -> list[str]:
    """The strings of a file that are no docstrings, as far as they are in one piece."""
    nodes = list(ast.walk(tree(file)))
    alone = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in alone]
    return [node.value for node in texts if isinstance(node.value, str)]


def calls(name: str) -> set[tuple[str, ...]]:
    """The words of each call in the code; WORD where one is known only when it is called."""
    found = set()
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name:
                words = [getattr(word, "value", None) for word in node.args]
                found.add(tuple(word if isinstance(word, str) else "WORD" for word in words))
    return {words for words in found if words and words[0] != "WORD"}


def run(text: str, cwd: Path, *more: str, **changed: str) -> str:
    """What the command of a message says."""
    words = shlex.split(re.findall(r"`([^`]+)`", text)[0])
    environment = {**os.environ, **changed}
    options = {"cwd": cwd, "env": environment, "stdin": subprocess.DEVNULL}
    done = subprocess.run([*words, *more], capture_output=True, text=True, **options)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The pack in a folder with a space, as ComfyUI has it: under another name, not installed."""
    pack = tmp_path_factory.mktemp("my nodes") / "ComfyUI-PCPO"
    for name in ["__init__.py", "registry.py", "remedies.py", *FILES]:
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, pack / name)
    return pack


def loaded(pack: Path):
    """Its module of remedies."""
    spec = importlib.util.spec_from_file_location("some_pack_remedies", pack / "remedies.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_message_spells_a_command_itself():
    own = "trainers/demo/__main__.py"  # a module's own name, for whoever makes the model again
    texts = {
        file: [t for t in literals(file) if BY_HAND.search(t)] for file in FILES if file != own
    }
    assert {file: text for file, text in texts.items() if text} == {}


def test_what_is_on_no_index_is_called_for_by_nobody():
    names = {word for words in calls("install") for word in words} | {*PACKAGES}
    assert not [name for name in names if "pcpo" in name]


@pytest.mark.parametrize("words", sorted(calls("command")), ids=" ".join)
def test_a_command_works_in_a_comfyui(words, elsewhere, tmp_path):
    text = loaded(elsewhere).command(*words).replace("COMMAND", "train")
    assert f"'{elsewhere / 'trainers'}'" in text
    assert "usage" in run(text, tmp_path, *(["--help"] if "--help" not in words else []))


def test_a_command_that_a_user_has_is_called_by_its_name(monkeypatch, tmp_path):
    script = tmp_path / ("pcpo.exe" if os.name == "nt" else "pcpo")
    script.write_text("")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    assert remedies.command("resume", "RUN").startswith(f"`{shlex.quote(sys.executable)} ")
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert remedies.command("resume", "my run") == "`pcpo resume 'my run'`"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert remedies.command("resume", Path("runs/a")) == "`uv run pcpo resume runs/a`"
    monkeypatch.setenv("PATH", os.devnull)
    assert remedies.command("resume", "RUN").startswith(f"`{shlex.quote(sys.executable)} ")


def test_paths_of_windows():
    plain = remedies.line(["C:\\ComfyUI\\python.exe", "-m", "pip"], "nt")
    assert plain == "`C:\\ComfyUI\\python.exe -m pip`"
    spaced = remedies.line(["C:\\my apps\\python.exe", "C:\\my nodes\\trainers"], "nt")
    assert spaced.startswith('`"C:\\my apps\\python.exe" "C:\\my nodes\\trainers"`')
    assert "PowerShell" in spaced


def test_the_folder_starts_as_a_module_too(tmp_path):
    words = [sys.executable, "-m", "trainers", "rewards", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_package_is_called_by_its_own_name(monkeypatch):
    monkeypatch.setattr(base, "find_spec", lambda name: None)
    with pytest.raises(RewardUnavailable, match=r"`.+ install .*rapidocr onnxruntime` and start"):
        load_reward("ocr")


@pytest.mark.parametrize("has_pip", [True, False])
def test_an_installation_is_by_the_python_that_runs(monkeypatch, has_pip):
    monkeypatch.setattr(remedies, "find_spec", lambda name: has_pip or None)
    words = shlex.split(remedies.install("rapidocr").strip("`"))
    start = [sys.executable, "-m"] if has_pip else ["uv"]
    assert words[: len(start)] == start
    assert sys.executable in words and words[-1] == "rapidocr"


@pytest.mark.slow  # asks a package index
@pytest.mark.parametrize("words", [*sorted(calls("install")), PACKAGES], ids=" ".join)
def test_an_installation_would_move_nothing(words, tmp_path):
    said = run(remedies.install(*words), tmp_path, "--dry-run")
    assert not re.search(r"^ [-~] (?!rapidocr)", said, re.MULTILINE)
    assert "Would install torch" not in said
