"""Fetch a weight file: from where it broke off, into its place when its checksum is right.

urllib, because what has to be seen to here is what hf_hub_download leaves out: progress for another
thread, a way to stop, the room on the disk, and the checksum of the catalogue. No torch.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from .catalogue import WeightFile, size_told

SPARE = 256 << 20
"""Bytes of a disk that are left free."""
BLOCK = 1 << 20
TIMEOUT = 20
"""Seconds in which a server has to answer."""
SLACK = 0.02
"""How far the size of a source may be from the catalogue's, which is rounded for some."""
PAUSES = (1, 2, 4, 8, 16)
"""Seconds before another try after a break; a try that brings nothing is the last."""
KEPT = "what has arrived is kept"

Watch = Callable[[str, int, int], None]
"""Called with "loading" or "checking", the bytes that are done and their whole number; what it
raises ends the work."""


class NotFetched(RuntimeError):
    """Why a file did not arrive, in a sentence for the user."""


class _Broken(Exception):
    """A connection that ended too early."""


def part_of(target: Path) -> Path:
    """Where a file is kept until it is whole."""
    return target.with_name(f"{target.name}.part")


def arrived(target: Path) -> int:
    """How many bytes of a file are kept."""
    try:
        return part_of(target).stat().st_size
    except OSError:
        return 0


def source_of(file: WeightFile) -> str | None:
    """The address of a file of the catalogue; None where it has none."""
    if file.url is not None:
        return file.url
    if file.repo is None or file.file is None:
        return None
    from huggingface_hub import hf_hub_url  # which knows a mirror that the environment names

    return hf_hub_url(file.repo, file.file)


def is_offered(file: WeightFile) -> bool:
    """Whether a file can be fetched: its source and all of its checksum are known."""
    has_source = file.url is not None or (file.repo is not None and file.file is not None)
    return has_source and len(file.sha256 or "") == 64 and not file.beside


def fetch(url: str, target: Path, size: int, sha256: str | None, watch: Watch) -> str:
    """Load a file and put it in its place.

    Args:
        url: its source.
        target: its place, which must be free; its folder is made.
        size: in bytes, about.
        sha256: of its content, or its first digits; None takes what comes.
        watch: told how far it is.

    Returns:
        The sha256 of what came.

    Raises:
        NotFetched: why it is not there; what has arrived is kept, unless it is another file.
    """
    part = part_of(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _load_all(url, part, size, watch)
        digest = _digest(part, watch)
        if digest.startswith(sha256 or ""):
            os.replace(part, target)
            return digest
        part.unlink()
    except OSError as error:
        raise NotFetched(f"The file cannot be written ({error.strerror or error}).") from error
    raise NotFetched(
        "What arrived is another file than the one published: its sha256 is "
        f"{digest}. Nothing was kept."
    )


def _load_all(url: str, part: Path, size: int, watch: Watch) -> None:
    """Load what lacks, with another try after each break."""
    for pause in (*PAUSES, None):
        before = part.stat().st_size if part.exists() else 0
        try:
            return _load(url, part, size, watch)
        except _Broken as broken:
            if pause is None or not part.exists() or part.stat().st_size <= before:
                raise NotFetched(f"The connection broke ({broken}); {KEPT}.") from broken
        for _ in range(5 * pause):
            watch("loading", part.stat().st_size, size)
            time.sleep(0.2)
    return None


def _load(url: str, part: Path, size: int, watch: Watch) -> None:
    """Load what lacks by one connection."""
    have = part.stat().st_size if part.exists() else 0
    answer = _answer(url, have)
    if answer is None:  # nothing lies beyond what is there
        return
    with answer:
        begins = f"bytes {have}-"
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(begins):
            have = 0  # it sends all of it
        whole = have + int(answer.headers.get("Content-Length") or size)
        if abs(whole - size) > SLACK * size:
            offered = f"it offers {size_told(whole)} instead of {size_told(size)}"
            raise NotFetched(f"The source does not answer ({offered}); {KEPT}.")
        _check_room(part.parent, whole - have)
        with part.open("ab" if have else "wb", buffering=0) as stream:
            while have < whole and (block := _read(answer)):
                _write(stream, block, whole - have)
                have += len(block)
                watch("loading", have, whole)
    if have < whole:
        raise _Broken(f"{size_told(have)} of {size_told(whole)} came")


def _answer(url: str, have: int) -> HTTPResponse | None:
    """The source's answer; None where it has no more than what is there."""
    headers = {"User-Agent": "ComfyUI-PCPO"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416:
            raise NotFetched(f"The source does not answer (HTTP {error.code}); {KEPT}.") from error
        if error.headers.get("Content-Range", "").endswith(f"/{have}"):
            return None
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise NotFetched(f"The source does not answer ({why}); {KEPT}.") from error
    return _answer(url, 0)


def _read(answer: HTTPResponse) -> bytes:
    try:
        return answer.read(BLOCK)
    except (OSError, HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error


def _write(stream: object, block: bytes, rest: int) -> None:
    """Write a block; a full disk is told with what it lacks."""
    try:
        stream.write(block)  # pyright: ignore[reportAttributeAccessIssue]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise NotFetched(_full(rest, 0)) from error


def _check_room(folder: Path, rest: int) -> None:
    """Refuse to load what the disk cannot take."""
    free = shutil.disk_usage(folder).free
    if free < rest + SPARE:
        raise NotFetched(_full(rest + SPARE, free))


def _full(need: int, free: int) -> str:
    return (
        f"The disk is full: {size_told(need)} are needed, {size_told(free)} are free. "
        "What has arrived is kept."
    )


def _digest(part: Path, watch: Watch) -> str:
    """The SHA-256 of what arrived, safe on the disk."""
    found, done, whole = hashlib.sha256(), 0, part.stat().st_size
    with part.open("rb+") as stream:
        os.fsync(stream.fileno())
        while block := stream.read(BLOCK):
            found.update(block)
            done += len(block)
            watch("checking", done, whole)
    return found.hexdigest()
