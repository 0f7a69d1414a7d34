"""Who may ask what of the jobs. docs/security.md says it to those who run a server.

Pages: those of ComfyUI alone (`foreign`), whatever --enable-cors-header allows others elsewhere.
Names: where the server listens on loopback, a name of this machine (`wrong_host`); else a web site
could lead its own name here (DNS rebinding) and pass for a page of ComfyUI.
Users: with --multi-user each has jobs of their own (`UserJobs`). ComfyUI knows a user by the header
comfy-user of a request; a prompt that it queues keeps the name, for nodes run later. What names no
user that ComfyUI knows sees nothing and starts nothing.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import types
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from ...pcpo.remote.http import is_loopback
from ..errors import NodeError
from .registry import JobRegistry, UnknownJob

PORTS = {"http": 80, "https": 443}
HOSTS = "PCPO_ALLOWED_HOSTS"
"""Environment: more names of this server, with commas between them."""
DOWNLOADS = "PCPO_DOWNLOADS"
"""Environment: "on" or "off", whether the panel may download weights of rewards."""
USER = "pcpo_user"
"""Who queued a prompt, in its extra_data."""
NOBODY = (
    "ComfyUI was started with --multi-user, and this request names none of its users; open "
    "ComfyUI's page, choose a user, and try again (programs send the header comfy-user)"
)


# --- pages ---------------------------------------------------------------------------------------


def foreign(headers: Mapping[str, str]) -> str | None:
    """Why a request is not of ComfyUI's own pages; None where it is, or of no page at all.

    Args:
        headers: of the request, found by their names in lower case.

    Returns:
        One sentence, or None.
    """
    if headers.get("sec-fetch-site", "").lower() == "cross-site":
        return "requests from other websites are refused"
    origin, host = headers.get("origin"), headers.get("host", "")
    if origin is None:
        return None
    try:
        came = urlsplit(origin)
        goes = urlsplit(f"//{host}")
        default = PORTS.get(came.scheme)
        is_same = came.hostname is not None and came.hostname == goes.hostname
        is_same = is_same and (came.port or default) == (goes.port or default)
    except ValueError:  # a port that is no number
        is_same = False
    return None if is_same else "requests from other websites are refused"


# --- names ---------------------------------------------------------------------------------------


def wrong_host(headers: Mapping[str, str]) -> str | None:
    """Why a request came under a name that is not this server's; None where it may be.

    Args:
        headers: of the request, found by their names in lower case.

    Returns:
        One sentence, or None.
    """
    try:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        host = ""
    listens = _names(getattr(_args(), "listen", None) or "127.0.0.1")
    allowed = _names(os.environ.get(HOSTS, ""))
    is_open = not allowed and not all(map(_listens_on_loopback, listens))
    if is_open or _is_this_machine(host) or host in {*listens, *allowed}:
        return None
    return (
        f"{host[:80]!r} is not a known name of this server; use http://localhost, or list it in "
        f"the environment variable {HOSTS} of ComfyUI"
    )


def _names(text: str) -> list[str]:
    return [name.strip().strip("[]").lower() for name in text.split(",") if name.strip()]


def _is_this_machine(name: str) -> bool:
    """Whether a name is this machine's whatever a name server says: none is asked."""
    name = name.removesuffix(".")
    return is_loopback(name) or name.endswith(".localhost")


@lru_cache
def _listens_on_loopback(name: str) -> bool:
    """Whether a server that was told to listen on a name is reached from this machine alone."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        found = set()
    return all(map(_is_this_machine, found))


# --- users ---------------------------------------------------------------------------------------

_request: ContextVar[Any] = ContextVar("pcpo_request", default=None)
"""The request that is being answered."""


def is_shared() -> bool:
    """Whether ComfyUI keeps its users apart."""
    return bool(getattr(_args(), "multi_user", False))


def current_user() -> str | None:
    """The user behind the current request or running prompt; None if that is not certain."""
    host = server()
    if (request := _request.get()) is not None:
        return _user_of(request)
    if host is None:
        return None
    running, _ = host.prompt_queue.get_current_queue_volatile()
    users = [item[3].get(USER) for item in running]
    return users[0] if len(users) == 1 else None


def admit() -> None:
    """Refuse to start a job that would belong to no user."""
    if is_shared() and current_user() is None:
        raise NodeError(NOBODY)


def watch(host: Any) -> None:
    """With --multi-user, have ComfyUI's server remember who asks."""
    if not is_shared():
        return
    from aiohttp import web

    @web.middleware
    async def remember(request: Any, handler: Callable[[Any], Any]) -> Any:
        token = _request.set(request)
        try:
            return await handler(request)
        finally:
            _request.reset(token)

    host.app.middlewares.append(remember)
    host.add_on_prompt_handler(sign)


def sign(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt with the user who queued it, whatever user it names itself."""
    return {**prompt, "extra_data": {**(prompt.get("extra_data") or {}), USER: current_user()}}


def _user_of(request: Any) -> str | None:
    """The user that a request names, as ComfyUI knows them; images are asked for by a query, for a
    page cannot give them a header."""
    named = request
    if "comfy-user" not in request.headers and request.method == "GET" and "user" in request.query:
        named = types.SimpleNamespace(headers={"comfy-user": request.query["user"]})
    try:
        return server().user_manager.get_request_user_id(named)
    except (KeyError, AttributeError):
        return None


def _args() -> Any:
    return getattr(sys.modules.get("comfy.cli_args"), "args", None)


def server() -> Any:
    """ComfyUI's running server; None where the pack is loaded without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


class UserJobs:
    """The jobs of one user; all others do not exist for them.

    Args:
        user: whose are shown; None for nobody's.
    """

    def __init__(self, everyone: JobRegistry, user: str | None) -> None:
        self._everyone, self._user = everyone, user
        self.root, self.free_name = everyone.root, everyone.free_name
        self.waited_for = everyone.waited_for

    def _owns(self, job: Mapping[str, Any]) -> bool:
        return self._user is not None and job["user"] == self._user

    def _check_owner(self, id: str) -> JobRegistry:
        """All jobs, where this one is the user's; `UnknownJob`."""
        self.summary(id)
        return self._everyone

    def jobs(self) -> list[dict[str, Any]]:
        """As `JobRegistry.jobs`; the methods below likewise."""
        return [job for job in self._everyone.jobs() if self._owns(job)]

    def summary(self, id: str) -> dict[str, Any]:
        """A job's name, state and last numbers."""
        found = self._everyone.summary(id)
        if not self._owns(found):
            raise UnknownJob(id)
        return found

    def answer(self, id: str | None = None) -> dict[str, Any]:
        """Jobs, or one job, with the time of the answer."""
        if id is not None:
            return self._check_owner(id).answer(id)
        found = self._everyone.answer()
        return {**found, "jobs": [job for job in found["jobs"] if self._owns(job)]}

    def job(self, id: str) -> dict[str, Any]:
        """A job in detail."""
        return self._check_owner(id).job(id) | {"folder": None}

    def folder(self, id: str) -> Any:
        """A job's folder."""
        return self._check_owner(id).folder(id)

    def ask(self, id: str, request: Any) -> None:
        """Ask something of its worker."""
        self._check_owner(id).ask(id, request)

    def resume(self, id: str) -> None:
        """Put it back into the queue."""
        self._check_owner(id).resume(id)

    def delete(self, id: str) -> None:
        """Remove it."""
        self._check_owner(id).delete(id)

    def create(self, *given: Any, **named: Any) -> str:
        """A new job of the user's."""
        if self._user is None:
            raise NodeError(NOBODY)
        return self._everyone.create(*given, **named, user=self._user)


Jobs = JobRegistry | UserJobs


# --- downloads ---------------------------------------------------------------------------------


def downloads_off() -> str | None:
    """Why the panel downloads nothing; None where it may: as the environment says, else where only
    this machine and one user reach the server.
    """
    switch = os.environ.get(DOWNLOADS, "").strip().lower()
    listens = _names(getattr(_args(), "listen", None) or "127.0.0.1")
    if switch == "on" or (
        not switch and not is_shared() and all(map(_listens_on_loopback, listens))
    ):
        return None
    if switch:
        return f"Downloads are off, as the environment variable {DOWNLOADS} says."
    return (
        "Downloads are off, because others than its owner may reach this ComfyUI. The owner can "
        f"allow them: start it with {DOWNLOADS}=on."
    )


# --- paths ---------------------------------------------------------------------------------------

FOLDERS = re.compile(r"""(?<![\w/\\.:~-])(?:[A-Za-z]:)?[\\/]{1,2}(?:[^\s"'<>|:*?,;\\/]+[\\/])+""")
"""The folders of an absolute path within a text."""


def public(value: Any) -> Any:
    """A value with the server's paths cut down to file names, so that any user may see it.

    >>> public({"file": "/opt/you and me/a.png", "log": "wrote /tmp/x/b.png, see http://c/d"})
    {'file': 'a.png', 'log': 'wrote b.png, see http://c/d'}
    """
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items()}
    if isinstance(value, list):
        return [public(part) for part in value]
    if not isinstance(value, str):
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute() and "\n" not in value:
            return kind(value).name
    for folder in _own_folders():
        value = value.replace(f"{folder}{os.sep}", "")
    return FOLDERS.sub("", value)


@lru_cache
def _own_folders() -> list[str]:
    """Folders that texts may name and that may have spaces in them, the longest first."""
    paths = sys.modules.get("folder_paths")
    named = getattr(paths, "folder_names_and_paths", {})
    found = [folder for folders, *_ in named.values() for folder in folders]
    found += [getattr(paths, name, "") for name in ("base_path", "models_dir", "user_directory")]
    found += [str(Path(__file__).parents[2]), str(Path.home()), sys.prefix]
    return sorted({str(folder) for folder in found if len(str(folder)) > 1}, key=len, reverse=True)


def public_text(text: str) -> str:
    """A text for a page of ComfyUI: as it is, or `public` where there are several users."""
    return public(text) if is_shared() else text
