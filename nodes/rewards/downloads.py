"""The weights of rewards that are here, and the download of those that are not.

Only what the catalogue names is loaded, from the source that it names, into ComfyUI's models
folder, and only where the checksum is known. One file is loaded at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...pcpo.pretrained import fetch
from ...pcpo.pretrained.catalogue import WEIGHTS, WeightFile, rewards_of
from ...pcpo.pretrained.find import MissingWeights, WrongWeights, find
from ...pcpo.pretrained.read import sha256_of
from ..jobs.access import downloads_off
from .make import weight_folders

UNKNOWN_SUM = (
    "This pack knows no checksum of the file, so it is not downloaded from here; get it by hand."
)

log = logging.getLogger(__name__)


class Refused(RuntimeError):
    """Why a download is not begun or ended, in a sentence, with the HTTP status that says so."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Cancelled(Exception):
    """The user wants the download no more."""


@dataclass
class Download:
    """One file on its way, or the reason why it is not."""

    file: WeightFile
    target: Path
    state: str = "waiting"
    done: int = 0
    size: int = 0
    speed: float = 0.0
    message: str = ""
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    _begun: tuple[float, int] | None = None

    @property
    def is_active(self) -> bool:
        return self.state in ("waiting", "loading", "checking")

    def watch(self, state: str, done: int, size: int) -> None:
        """Keep how far it is; as `fetch.Watch`."""
        if self.stop.is_set():
            raise _Cancelled
        now = time.monotonic()
        self._begun = self._begun or (now, done)
        seconds = now - self._begun[0]
        self.speed = (done - self._begun[1]) / seconds if seconds > 1 else 0.0
        self.state, self.done, self.size = state, done, size

    def run(self) -> None:
        """Wait for the turn, and load the file."""
        while not _turn.acquire(timeout=0.1):
            if self.stop.is_set():
                self.state = "missing"
                return
        try:
            self.watch("loading", self.done, self.size)
            source = str(fetch.source_of(self.file))
            fetch.fetch(source, self.target, self.file.size, str(self.file.sha256), self.watch)
            self.state = "there"
            log.info("PCPO: %s was downloaded to %s", self.file.name, self.target)
        except _Cancelled:
            self.state = "missing"
        except fetch.NotFetched as error:
            self.message, self.state = str(error), "failed"
        except Exception as error:  # a thread's error would be seen by nobody
            log.exception("PCPO: %s was not downloaded", self.file.name)
            self.message, self.state = f"{type(error).__name__}: {error}", "failed"
        finally:
            _turn.release()


_downloads: dict[str, Download] = {}
"""By the file's name: two entries of the catalogue may be one file."""
_guard, _turn = threading.Lock(), threading.Lock()


def files() -> list[WeightFile]:
    """The catalogue's files that rewards need."""
    return [file for file in WEIGHTS.values() if rewards_of(file.key)]


def place_of(file: WeightFile) -> Path:
    """Where a file belongs: in the first folder of its kind that ComfyUI knows."""
    import folder_paths

    weight_folders()  # which makes the folder of rewards known
    named = folder_paths.get_folder_paths(file.folder)
    return Path(named[0] if named else Path(folder_paths.models_dir) / file.folder) / file.name


def listing() -> dict[str, Any]:
    """All files with their states, and why none may be downloaded."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for file in files():
        now = about(file)
        one = found.setdefault((now["folder"], now["name"], now["state"]), now)
        one["rewards"] = list(dict.fromkeys([*one["rewards"], *now["rewards"]]))
    return {"files": list(found.values()), "off": downloads_off()}


def about(file: WeightFile) -> dict[str, Any]:
    """A file, what it is for, and how far it is."""
    return {
        "key": file.key,
        "name": file.name,
        "folder": file.folder,
        "page": file.page,
        "size": file.size,
        "licence": file.licence,
        "unverified": "licence" in file.unverified,
        "rewards": rewards_of(file.key),
        "refusal": None if fetch.is_offered(file) else UNKNOWN_SUM,
        **_state(file),
    }


def _state(file: WeightFile) -> dict[str, Any]:
    known, target = _downloads.get(file.name), place_of(file)
    if known is not None and known.is_active:
        size = {"size": known.size} if known.size else {}
        return {
            "state": known.state,
            "done": known.done,
            "speed": known.speed,
            "message": "",
        } | size
    found = {"state": "missing", "done": fetch.arrived(target), "speed": 0.0, "message": ""}
    if _is_there(file):
        return found | {"state": "there", "done": file.size}
    if target.is_file():
        return found | {"state": "wrong", "message": _wrong(target), "refusal": _wrong(target)}
    if known is not None and known.state == "failed":
        return found | {"state": "failed", "message": known.message}
    return found


def _is_there(file: WeightFile) -> bool:
    """Whether a reward would find the file, wherever it is."""
    try:
        find(file.key, weight_folders())
    except (MissingWeights, WrongWeights, OSError):
        return False
    return True


def _wrong(target: Path) -> str:
    return (
        "This file is there, but it is another than the one published: its sha256 is "
        f"{sha256_of(target)}. Move it away, then download."
    )


def download(key: str) -> None:
    """Begin to load a file, or go on.

    Raises:
        Refused: if that cannot be.
    """
    file = _file(key)
    if why := downloads_off():
        raise Refused(403, why)
    with _guard:
        now = about(file)
        if now["state"] == "there":
            raise Refused(409, "It is there already.")
        if why := now["refusal"]:
            raise Refused(409, why)
        known = _downloads.get(file.name)
        if known is not None and known.is_active:
            raise Refused(409, "It is being downloaded already.")
        target = place_of(file)
        begun = Download(file, target, done=fetch.arrived(target))
        begun.thread = threading.Thread(target=begun.run, name=f"pcpo {file.name}", daemon=True)
        _downloads[file.name] = begun
        begun.thread.start()


def cancel(key: str) -> None:
    """Stop loading a file; what has arrived is kept.

    Raises:
        Refused: if it is not being loaded.
    """
    known = _downloads.get(_file(key).name)
    if known is None or not known.is_active or known.thread is None:
        raise Refused(409, "It is not being downloaded.")
    known.stop.set()
    known.thread.join(2)  # it looks at each block


def _file(key: str) -> WeightFile:
    """The entry of the catalogue that a client names."""
    found = {file.key: file for file in files()}.get(key)
    if found is None:
        raise Refused(404, "There is no such file in the catalogue.")
    return found
