"""The command `pcpo`: `python -m comfyui_pcpo.trainers`, or `python` and the path of this folder.

In the pack's folder, `python -m trainers` works too. ComfyUI starts workers by path, because the
pack's folder may have any name there.
"""

import sys
from collections.abc import Callable
from pathlib import Path

ALIAS = "comfyui_pcpo"


def command() -> Callable[[], int]:
    """The command's function, from this very pack.

    When it is started by path, Python puts this folder first in `sys.path`, where `import evaluate`
    would find ours, and knows no package above it: the root is then loaded under its installed
    name.
    """
    if __package__ and "." in __package__:
        from .cli.command import main

        return main
    import importlib
    import importlib.util

    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    root = here.parent
    spec = importlib.util.spec_from_file_location(
        ALIAS, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[ALIAS] = package = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except ImportError as error:  # of a Python that is too old
        sys.exit(f"pcpo: {error}")
    return importlib.import_module(f"{ALIAS}.trainers.cli").main


if __name__ == "__main__":
    sys.exit(command()())
