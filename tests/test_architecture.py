"""The arrows of the design: who may import what, and how long files and functions may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import comfyui_pcpo
import pytest

ROOT = Path(comfyui_pcpo.__path__[0])
FILES = ["__init__.py", "remedies.py"] + [
    path.relative_to(ROOT).as_posix()
    for part in ("pcpo", "trainers", "nodes")
    for path in sorted((ROOT / part).rglob("*.py"))
]
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server"}
TRAINING = {"diffusers", "peft", "accelerate"}
EXTRAS = {"pcpo/rewards/ocr.py": ("rapidocr",)}
"""Packages of an extra, which a reward imports when it is used."""

BOUNDARY = (  # all that nodes/ may know
    *(
        "trainers.config.train_config",
        "trainers.config.effects",
        "trainers.errors",
        "trainers.job.files",
        "trainers.families.header",
    ),
    *("trainers.families.source", "trainers.families.text.header", "trainers.job.folder"),
    *("trainers.job.contents", "trainers.job.worker", "trainers.job.metrics"),
    *(
        "trainers.job.preflight",
        "trainers.job.prompts",
        "trainers.job.prompt_files",
        "trainers.reading",
    ),
    *("trainers.estimate.memory", "trainers.estimate.fit", "trainers.estimate.network_costs"),
    "trainers.estimate.reward_costs",
)


def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


def libraries(file: str) -> set[str]:
    """Top-level names of everything imported from outside the package, wherever in the file."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def relatives(file: str) -> set[str]:
    """What is imported from inside the package, as dotted paths from its root."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folders = file.split("/")[:-1]
            base = folders[: len(folders) - node.level + 1]
            base += node.module.split(".") if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def beyond(file: str, *allowed: str) -> set[str]:
    """What a file imports from the package that is not inside one of the allowed places."""
    return {r for r in relatives(file) if not f"{r}.".startswith(tuple(f"{a}." for a in allowed))}


@pytest.mark.parametrize("file", FILES)
def test_imports_inside_the_package_are_relative(file):
    assert not libraries(file) & {"comfyui_pcpo", "pcpo", "trainers", "nodes"}


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("pcpo/")])
def test_the_method_knows_torch_alone(file):
    allowed = {"torch", "numpy", "jaxtyping"}
    if file.startswith("pcpo/rewards/"):
        common = {"transformers", "PIL", "safetensors", "huggingface_hub", "ftfy"}
        allowed |= {*common, *EXTRAS.get(file, ())}
    elif file.startswith("pcpo/metrics/"):
        allowed |= {"transformers"}
    elif file.startswith("pcpo/statistics/"):
        allowed -= {"torch"}
        assert not beyond(file, "pcpo.statistics")
    assert libraries(file) <= allowed | sys.stdlib_module_names
    assert not beyond(file, "pcpo", "remedies")


USED_LATE = ("pcpo/rewards/", "pcpo/metrics/")


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(USED_LATE)])
def test_what_is_heavy_is_imported_when_it_is_used(file):
    light = {"torch", "numpy", "jaxtyping", "PIL"} | sys.stdlib_module_names
    at_once = [node for node in tree(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in at_once if isinstance(node, ast.Import) for alias in node.names]
    names += [n.module for n in at_once if isinstance(n, ast.ImportFrom) and n.level == 0]
    assert {name.split(".")[0] for name in names} <= light


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("trainers/")])
def test_the_trainers_know_the_method_and_not_comfyui(file):
    assert not libraries(file) & COMFYUI
    assert not beyond(file, "trainers", "pcpo", "remedies")


@pytest.mark.parametrize("file", ["__init__.py", *(f for f in FILES if f.startswith("nodes/"))])
def test_the_nodes_know_the_job_boundary_and_the_method(file):
    assert not libraries(file) & TRAINING
    assert not beyond(file, "nodes", "pcpo", "remedies", *BOUNDARY)


def test_what_all_may_know_knows_nothing():
    assert libraries("remedies.py") <= sys.stdlib_module_names
    assert not relatives("remedies.py")


@pytest.mark.parametrize("module", [m for m in BOUNDARY if f"{m.replace('.', '/')}.py" in FILES])
def test_the_job_boundary_is_imported_without_torch(module):
    # loaded by path under another name, as ComfyUI does, and in a process of its own
    script = (
        "import importlib.util as u, sys; root = sys.argv[1]\n"
        "spec = u.spec_from_file_location('some_pack', root + '/__init__.py',"
        " submodule_search_locations=[root])\n"
        "sys.modules['some_pack'] = m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        f"__import__('some_pack.{module}')\n"
        "print(*{'torch', 'diffusers', 'transformers', 'comfyui_pcpo'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(ROOT)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("file", FILES)
def test_functions_are_short(file):
    functions = [
        node
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: length(f) for f in functions if length(f) > 50}
    assert not long, long
