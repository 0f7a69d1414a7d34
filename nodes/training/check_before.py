"""What can be refused of a training before anything runs: by the graph and by files' headers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from ...trainers.errors import UserError
from ...trainers.estimate.disk import disk_bytes
from ...trainers.families.header import known_as, read_header
from ...trainers.families.registry import spec_of_source
from ...trainers.families.source import inspect_source
from ..demo.nodes import DEMOS as DEMO_FOLDERS
from ..errors import NodeError
from ..families import DEMOS
from ..graph import Node, before, is_link, sent_graph, values_of
from ..names import NODE_ID
from .cost import check_disk, network_of
from .host import NONE, lora_path, models_folder
from .settings import Values, check_family
from .settings import values_of as read_settings
from .start import check_init_lora, lora_name

LOADERS = {
    "CheckpointLoaderSimple": ("ckpt_name", "checkpoints"),
    "CheckpointLoader": ("ckpt_name", "checkpoints"),
    "UNETLoader": ("unet_name", "diffusion_models"),
}
"""The widget and the folder of ComfyUI's loaders."""
DEMO = "PCPODemoModel"


def settings_of(node: Node | None) -> Values | None:
    """The config of a PCPO Training Settings; None where a widget of it is connected."""
    given = None if node is None else values_of(node, "preset")
    return None if given is None else read_settings(given)


def check_training(node: Node, jobs: Path) -> None:
    """Refuse a PCPO Train in Background by what it is connected to.

    Args:
        jobs: their folder.
    """
    graph, given = sent_graph(), node["inputs"]
    if isinstance(name := given.get("name"), str):
        lora_name(name)
    base = base_before(node)
    family = _family_of(base)
    try:
        found = before(graph, node, "settings")
        is_ours = found is not None and found.get("class_type") == NODE_ID
        settings = settings_of(found) if is_ours else None
    except NodeError:  # which its own node says
        settings = None
    if settings is not None and family is not None:
        check_family(settings, family)
    lora = given.get("continue_from", NONE)
    if settings is not None and not is_link(lora) and (path := lora_path(lora)) is not None:
        check_init_lora(path, settings["trainable"]["rank"], family)
    if settings is not None and base is not None:
        check_room(settings, base, jobs)


def check_room(settings: Values, base: str, jobs: Path) -> None:
    """Refuse a training that a disk has no room for.

    Args:
        jobs: their folder.
    """
    network = network_of(base, settings["model"]["source"])
    check_disk(disk_bytes(settings, network), (jobs, models_folder("loras")))


def base_before(node: Node) -> str | None:
    """What the MODEL of a node is, a demo's source or a family; None where that is not known."""
    graph, seen = sent_graph(), []
    found = before(graph, node, "model")
    while found is not None and found not in seen:
        seen.append(found)
        kind, given = str(found.get("class_type")), found["inputs"]
        if kind == DEMO:
            demo = given.get("demo")
            return DEMOS[demo] if demo in DEMO_FOLDERS else None
        if kind in LOADERS:
            widget, folder = LOADERS[kind]
            path = _file(folder, given.get(widget))
            about = path and path.stat()
            return path and about and _family_of_file(path, about.st_mtime_ns, about.st_size)
        found = before(graph, found, "model")
    return None


def _file(folder: str, name: Any) -> Path | None:
    import folder_paths

    path = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
    return None if path is None else Path(path)


@lru_cache(maxsize=64)
def _family_of_file(path: Path, *_: int) -> str | None:
    """The family of a model file, None where its header does not tell; others are refused."""
    try:
        return inspect_source(path).family
    except (UserError, OSError) as error:
        if isinstance(error, UserError) and _is_another(path):
            raise NodeError(str(error)) from error
        return None  # ComfyUI may know it all the same


def _is_another(path: Path) -> bool:
    try:
        return known_as(read_header(path)) is not None
    except (UserError, OSError):
        return False


def _family_of(base: str | None) -> str | None:
    demo = None if base is None else spec_of_source(base)
    return base if demo is None else demo.name
