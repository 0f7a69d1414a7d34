"""The arrows of the design: which package imports which, how large folders and functions get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import comfyui_pcpo
import pytest

ROOT = Path(comfyui_pcpo.__path__[0])
KNOWN = ("registry", "remedies")
"""What all may import."""
FILES = ["__init__.py", *(f"{name}.py" for name in KNOWN)] + [
    path.relative_to(ROOT).as_posix()
    for part in ("pcpo", "trainers", "nodes")
    for path in sorted((ROOT / part).rglob("*.py"))
]
COMFYUI = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server"}
TRAINING = {"diffusers", "peft", "accelerate"}
EXTRAS = {"pcpo/rewards/ocr.py": ("rapidocr",)}
"""Packages of an extra, which a reward imports when it is used."""

ARROWS = {
    "": "nodes.extension",
    "pcpo.pictures": "",
    "pcpo.statistics": "",
    "pcpo": "pcpo.pictures pcpo.statistics",
    "pcpo.pretrained": "pcpo.pictures pcpo",
    "pcpo.remote": "pcpo.pictures pcpo",
    "pcpo.rewards": "pcpo.pictures pcpo pcpo.pretrained pcpo.remote",
    "pcpo.metrics": "pcpo.pictures pcpo pcpo.pretrained pcpo.rewards",
    "trainers.errors": "",
    "trainers.finite": "trainers.errors",
    "trainers.reading": "trainers.errors",
    "trainers.config": "trainers.errors trainers.reading trainers.families",
    "trainers.families": "pcpo pcpo.pretrained trainers.errors trainers.finite trainers.reading",
    "trainers.job": "pcpo trainers.errors trainers.reading trainers.config trainers.families",
    "trainers.taste": (
        "pcpo.pictures pcpo.statistics pcpo.rewards trainers.errors trainers.reading trainers.job"
    ),
    "trainers.memory": "pcpo.rewards trainers.config trainers.families",
    "trainers.demo": "pcpo pcpo.rewards trainers.config trainers.job",
    "trainers.distributed": "trainers.errors trainers.config trainers.job",
    "trainers.lora": "pcpo trainers.finite trainers.families trainers.job",
    "trainers.report": "pcpo.pictures trainers.config trainers.job",
    "trainers.estimate": "trainers.config trainers.families trainers.memory trainers.lora",
    "trainers.run": (
        "pcpo.pictures pcpo pcpo.rewards pcpo.metrics trainers.errors trainers.finite "
        "trainers.reading trainers.config trainers.families trainers.job trainers.memory "
        "trainers.distributed trainers.lora trainers.report trainers.taste"
    ),
    "trainers.compare": (
        "pcpo.statistics pcpo.metrics trainers.reading trainers.config trainers.job "
        "trainers.memory trainers.report trainers.run trainers.evaluate"
    ),
    "trainers.profile": (
        "trainers.reading trainers.config trainers.families trainers.job trainers.memory "
        "trainers.run"
    ),
    "trainers.bench": (
        "pcpo trainers.reading trainers.config trainers.families trainers.job trainers.memory "
        "trainers.lora trainers.report trainers.estimate trainers.run trainers.profile"
    ),
    "trainers.reward_server": (
        "pcpo.pretrained pcpo.remote pcpo.rewards trainers.reading trainers.config trainers.job "
        "trainers.memory trainers.run"
    ),
    "trainers.evaluate": (
        "pcpo.pictures pcpo.statistics pcpo.rewards pcpo.metrics trainers.reading "
        "trainers.config trainers.families trainers.job trainers.memory trainers.distributed "
        "trainers.lora trainers.report trainers.run"
    ),
    "trainers.cli": (
        "pcpo.pictures pcpo.statistics pcpo pcpo.pretrained pcpo.rewards trainers.errors "
        "trainers.reading trainers.config trainers.families trainers.job trainers.memory "
        "trainers.distributed trainers.lora trainers.report trainers.estimate trainers.run "
        "trainers.compare trainers.profile trainers.bench trainers.reward_server "
        "trainers.evaluate "
        "trainers.taste"
    ),
    "trainers": "trainers.cli",
    "nodes": "",
    "nodes.errors": "",
    "nodes.sockets": "nodes.errors",
    "nodes.graph": "nodes.errors nodes.jobs",
    "nodes.host": "pcpo nodes.errors",
    "nodes.demo": "trainers.config nodes.errors nodes.host",
    "nodes.names": "pcpo trainers.config nodes.errors",
    "nodes.families": "trainers.config trainers.families nodes.demo",
    "nodes.handover": (
        "pcpo pcpo.pretrained trainers.errors trainers.families trainers.job nodes.errors "
        "nodes.host nodes.demo nodes.families"
    ),
    "nodes.jobs": "pcpo.remote trainers.config trainers.job nodes.errors nodes.names",
    "nodes.show": "nodes.jobs",
    "nodes.taste": (
        "pcpo.pictures pcpo.rewards trainers.errors trainers.job trainers.taste nodes.errors "
        "nodes.sockets nodes.names nodes.jobs nodes.show nodes.rewards"
    ),
    "nodes.guidance": "pcpo nodes.errors nodes.names nodes.show",
    "nodes.rewards": (
        "pcpo.pictures pcpo.statistics pcpo.pretrained pcpo.remote pcpo.rewards trainers.errors "
        "trainers.reading trainers.job nodes.errors nodes.graph nodes.sockets nodes.jobs nodes.show"
    ),
    "nodes.sampling": (
        "pcpo.pictures pcpo trainers.families nodes.errors nodes.graph nodes.sockets nodes.host "
        "nodes.families nodes.guidance"
    ),
    "nodes.training": (
        "pcpo.pictures pcpo pcpo.rewards trainers.errors trainers.config trainers.families "
        "trainers.job trainers.estimate nodes.errors nodes.graph nodes.sockets nodes.host "
        "nodes.demo nodes.names nodes.families nodes.handover nodes.jobs nodes.show nodes.rewards"
    ),
    "nodes.compare": (
        "pcpo.pictures pcpo.statistics pcpo.rewards pcpo.metrics nodes.errors nodes.sockets "
        "nodes.graph nodes.host nodes.names nodes.show nodes.guidance nodes.rewards nodes.training"
    ),
    "nodes.extension": (
        "nodes.errors nodes.graph nodes.demo nodes.jobs nodes.guidance nodes.rewards "
        "nodes.sampling nodes.taste nodes.training nodes.compare"
    ),
}
"""What each package imports from others, apart from `KNOWN`. A file belongs to the longest of these
names that its own begins with."""

BOUNDARY = (
    *("trainers.errors", "trainers.reading", "trainers.config", "trainers.job"),
    *("trainers.families.header", "trainers.families.source", "trainers.families.text.header"),
    *("trainers.families.registry", "trainers.families.spec", "trainers.taste"),
    *("trainers.estimate.fit", "trainers.estimate.memory", "trainers.estimate.network_costs"),
    "trainers.estimate.disk",
)
"""All of trainers/ that nodes/ may import; none of it imports torch."""

LIBRARIES = {
    "pcpo": {"torch", "numpy", "jaxtyping"},
    "pcpo.statistics": {"numpy", "jaxtyping"},
    "pcpo.pictures": {"torch", "numpy", "jaxtyping", "PIL"},
    "pcpo.remote": {"torch", "PIL", "pydantic"},
    "pcpo.pretrained": {
        *("torch", "jaxtyping", "PIL", "transformers", "safetensors", "huggingface_hub"),
        *("ftfy", "torchvision"),
    },
    "pcpo.rewards": {"torch", "numpy", "jaxtyping", "PIL", "transformers", "safetensors"},
    "pcpo.metrics": {"torch", "numpy", "jaxtyping"},
}
LIGHT = {"torch", "numpy", "jaxtyping", "PIL", "pydantic"} | sys.stdlib_module_names
"""What the method's packages may import before it is used."""


@cache
def tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def libraries(file: str) -> set[str]:
    """Top-level names of everything imported from outside the package, wherever in the file."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


@cache
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


def package_of(name: str) -> str:
    """The row of the table that a dotted path belongs to."""
    parts = name.split(".")
    ends = (".".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((end for end in ends if end in ARROWS), "")


def dotted(file: str) -> str:
    return file.removesuffix(".py").removesuffix("__init__").replace("/", ".").strip(".")


def arrows_of(file: str) -> set[str]:
    """Other packages that a file imports from."""
    found = {package_of(name) for name in relatives(file) if name.split(".")[0] not in KNOWN}
    return found - {package_of(dotted(file))}


def module_of(name: str) -> str:
    """The file that a dotted path leads to: a module's, or that of the module it is in."""
    path = name.replace(".", "/")
    places = (f"{path}.py", f"{path}/__init__.py", f"{path.rpartition('/')[0]}.py")
    ends = (*places, f"{path.rpartition('/')[0]}/__init__.py".lstrip("/"))
    return next(place for place in ends if place in FILES)


def circle(arrows: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("file", FILES)
def test_imports_inside_the_package_are_relative(file):
    assert not libraries(file) & {"comfyui_pcpo", "pcpo", "trainers", "nodes"}


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_the_packages_that_its_own_may(file):
    assert arrows_of(file) <= set(ARROWS[package_of(dotted(file))].split())


def test_the_arrows_of_the_table_are_all_used():
    found = {package: set() for package in ARROWS}
    for file in FILES:
        found[package_of(dotted(file))] |= arrows_of(file)
    assert {package: set(row.split()) for package, row in ARROWS.items()} == found


def test_no_packages_import_each_other_in_a_circle():
    assert not circle({package: set(row.split()) for package, row in ARROWS.items()})


def test_no_files_import_each_other_in_a_circle():
    # not even within functions or for types alone
    found = {file: {module_of(name) for name in relatives(file)} - {file} for file in FILES}
    assert not circle(found)


def test_the_method_knows_no_trainer_and_the_trainers_no_node():
    order = (*KNOWN, "pcpo", "trainers", "nodes")
    for package, row in ARROWS.items():
        known = order[: order.index(package.split(".")[0]) + 1] if package else order
        assert {name.split(".")[0] for name in row.split()} <= set(known), package


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("pcpo/")])
def test_the_method_knows_torch_alone(file):
    allowed = LIBRARIES[package_of(dotted(file))] | {*EXTRAS.get(file, ())}
    assert libraries(file) <= allowed | sys.stdlib_module_names
    at_once = [node for node in tree(file).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in at_once if isinstance(node, ast.Import) for alias in node.names]
    names += [n.module for n in at_once if isinstance(n, ast.ImportFrom) and n.level == 0]
    assert {name.split(".")[0] for name in names} <= LIGHT  # the rest when it is used


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("trainers/")])
def test_the_trainers_do_not_know_comfyui(file):
    assert not libraries(file) & COMFYUI


@pytest.mark.parametrize("file", ["__init__.py", *(f for f in FILES if f.startswith("nodes/"))])
def test_the_nodes_know_the_job_boundary_and_the_method(file):
    assert not libraries(file) & TRAINING
    known = tuple(f"{name}." for name in ("nodes", "pcpo", *KNOWN, *BOUNDARY))
    assert not {name for name in relatives(file) if not f"{name}.".startswith(known)}


@pytest.mark.parametrize("name", KNOWN)
def test_what_all_may_know_knows_nothing(name):
    assert libraries(f"{name}.py") <= sys.stdlib_module_names
    assert not relatives(f"{name}.py")


@pytest.mark.parametrize("name", BOUNDARY)
def test_the_job_boundary_is_imported_without_torch(name):
    # loaded by path under another name, as ComfyUI does, and in a process of its own
    within = [dotted(file) for file in FILES if f"{dotted(file)}.".startswith(f"{name}.")]
    assert within
    script = (
        "import importlib.util as u, sys; root = sys.argv[1]\n"
        "spec = u.spec_from_file_location('some_pack', root + '/__init__.py',"
        " submodule_search_locations=[root])\n"
        "sys.modules['some_pack'] = m = u.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'comfyui_pcpo'}\n"
        "for name in sys.argv[2:]:\n"
        "    __import__(f'some_pack.{name}')\n"
        "    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))"
    )
    command = [sys.executable, "-c", script, str(ROOT), *within]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_has_one_idea_and_at_most_25_files():
    listed = Counter(file.rpartition("/")[0] for file in FILES)
    assert {folder: count for folder, count in listed.items() if count > 25} == {}
    for folder in listed:
        assert ast.get_docstring(tree(f"{folder}/__init__.py".lstrip("/"))), folder


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
