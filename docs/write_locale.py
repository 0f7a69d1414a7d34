"""Bring locales/en/nodeDefs.json up to date with the nodes: inputs that are new, and all tooltips.

    uv run --extra test python docs/write_locale.py

Names are written in that file by hand; a new input gets its own name with spaces.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
FILE = DOCS.parent / "locales" / "en" / "nodeDefs.json"
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"


def flat(inputs: list[Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """All inputs of a node, by the names that the frontend looks up: "." is written as "_"."""
    for given in inputs:
        yield before + given.id, given
        if given.io_type == DYNAMIC:
            for option in given.options:
                yield from flat(option.inputs, f"{before}{given.id}_")


def updated(texts: dict[str, Any], schema: Any) -> dict[str, Any]:
    """One node's texts as they should be."""
    names = {key: text["name"] for key, text in texts["inputs"].items()}
    inputs = {
        key: {
            "name": names.get(key, given.id.replace("_", " ")),
            "tooltip": given.tooltip or "",
        }
        for key, given in flat(schema.inputs)
    }
    return texts | {"inputs": inputs}


def main() -> None:
    """Write the file anew."""
    sys.path.insert(0, str(DOCS.parent / "tests" / "fixtures"))
    import comfy_api_fixture  # ComfyUI's own classes are on no package index

    texts = json.loads(FILE.read_text("utf-8"))
    for node in comfy_api_fixture.all_nodes():
        schema = comfy_api_fixture.schema_of(node)
        texts[schema.node_id] = updated(texts[schema.node_id], schema)
    FILE.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
