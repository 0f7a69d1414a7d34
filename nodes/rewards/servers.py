"""Which servers a graph may have images sent to: those that the owner of this ComfyUI has named.

A graph comes from anybody. Without this, its options could have images, prompts and requests sent
to any address that this machine reaches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...pcpo.remote.http import checked_url, origin
from ..errors import NodeError

FILE = "reward_servers.txt"
"""In this pack's folder under ComfyUI's `user`, an address a line; no HTTP request reaches it."""


def with_server(name: str, key: str, usual: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's options with the owner's address in place of the graph's.

    Args:
        usual: the reward's own address, which may be asked where it runs.

    Returns:
        The options; without an address where neither the graph nor the environment has one.
    """
    own = _own(key)
    if "url" not in options:
        return {**options, "url": own} if own else dict(options)
    asked = options["url"]
    for named in (own, usual, *_listed_servers()):
        if named and isinstance(asked, str) and _are_one(named, asked):
            return {**options, "url": named}
    shown = f"the url {asked!r}" if "@" not in str(asked) else "a url with a user name"
    raise NodeError(
        f"the reward {name!r} is given {shown[:200]}, which the owner of this ComfyUI has not "
        "allowed: a graph must not choose where images are sent. If you are the owner, start "
        f"ComfyUI with {key}_URL set to the address, or write it on a line of {_file() or FILE}; "
        "or leave the option out"
    )


def _own(key: str) -> str | None:
    given = os.environ.get(f"{key}_URL", "").strip()
    return _check_url(given, f"{key}_URL") if given else None


def _file() -> Path | None:
    try:
        import folder_paths
    except ImportError:
        return None
    return Path(folder_paths.get_system_user_directory("pcpo")) / FILE


def _listed_servers() -> Iterator[str]:
    file = _file()
    if file is None or not file.is_file():
        return
    for line in file.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if (line := line.strip()) and not line.startswith("#"):
            yield _check_url(line, str(file))


def _check_url(url: str, where: str) -> str:
    try:
        return checked_url(url)
    except ValueError as error:
        raise NodeError(f"{where}: {error}") from error


def _are_one(named: str, asked: str) -> bool:
    """Whether two addresses are the same server and path on it."""
    try:
        asked = checked_url(asked)
    except ValueError:
        return False
    return origin(named) == origin(asked) and urlsplit(named).path == urlsplit(asked).path
