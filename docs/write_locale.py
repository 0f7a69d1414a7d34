"""Bring locales/en/nodeDefs.json up to date with the nodes: inputs that are new, and all tooltips.

    uv run --extra test python docs/write_locale.py

Names are written in that file by hand; a new input gets its own name with spaces.

With a language (as in ComfyUI's setting Comfy.Locale), add what it lacks with empty texts, and take
away what English has no more: locales/LANGUAGE/*.json and nodes/web/words/LANGUAGE.json.

    uv run --extra test python docs/write_locale.py zh
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
LOCALES = DOCS.parent / "locales"
FILE = LOCALES / "en" / "nodeDefs.json"
WEB = DOCS.parent / "nodes" / "web"
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


def write(file: Path, texts: Any) -> None:
    """Write a JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(texts, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read(file: Path) -> dict[str, Any]:
    """A JSON file; empty if it is not there."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def completed(known: Any, english: Any) -> Any:
    """The texts of a language with the keys of the English ones; empty where it lacks some."""
    if not isinstance(english, dict):
        return known if isinstance(known, str) else ""
    known = known if isinstance(known, dict) else {}
    return {key: completed(known.get(key), part) for key, part in english.items()}


def missing(known: dict[str, Any], keys: set[str], plurals: set[str]) -> dict[str, Any]:
    """The words of the panel that a language lacks, with empty texts."""
    return {key: {"other": ""} if key in plurals else "" for key in sorted(keys - known.keys())}


def write_language(language: str) -> None:
    """Complete the files of a language, and say what it lacks."""
    import words_fixture

    for english in sorted((LOCALES / "en").glob("*.json")):
        file = LOCALES / language / english.name
        write(file, completed(read(file), read(english)))
    file, keys = WEB / "words" / f"{language}.json", words_fixture.keys()
    known = read(file)
    lacks = missing(known, keys, {*words_fixture.plural_keys()})
    write(file, {key: text for key, text in sorted((known | lacks).items()) if key in keys})
    print(f"{file.name} lacked {len(lacks)} of {len(keys)} words")
    for page in sorted((WEB / "docs").glob("*.md")):
        if not (page.with_suffix("") / f"{language}.md").is_file():
            print(f"there is no nodes/web/docs/{page.stem}/{language}.md")


def main() -> None:
    """Write the files anew."""
    sys.path.insert(0, str(DOCS.parent / "tests" / "fixtures"))
    for language in sys.argv[1:]:
        write_language(language)
    if sys.argv[1:]:
        return
    import comfy_api_fixture  # ComfyUI's own classes are on no package index

    texts = read(FILE)
    for node in comfy_api_fixture.all_nodes():
        schema = comfy_api_fixture.schema_of(node)
        texts[schema.node_id] = updated(texts[schema.node_id], schema)
    write(FILE, texts)


if __name__ == "__main__":
    main()
