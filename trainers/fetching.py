"""Weights of rewards from the Hugging Face hub: asked about, loaded, verified, put in place."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..pcpo.rewards.catalogue import WeightFile
from .config import ConfigError
from .files import replacing

SPARE = 256 << 20
"""Bytes of a disk that are left free."""

BLOCK = 1 << 24


@dataclass(frozen=True, slots=True)
class Offer:
    """A file as the hub has it now.

    Attributes:
        file: what it is.
        name: its path in the repository.
        size: in bytes.
        sha256: of its content; None where the hub does not say.
        commit: of the repository.
    """

    file: WeightFile
    name: str
    size: int
    sha256: str | None
    commit: str


def offers_of(file: WeightFile) -> list[Offer]:
    """What the hub would give for a weight file: itself and what has to lie beside it.

    Args:
        file: what is wanted.

    Returns:
        It first.

    Raises:
        ConfigError: where it is not on the hub, there is no network, or the hub has another file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if file.repo is None or file.file is None:
        raise ConfigError(f"{file.name} is not on the hub; {by_hand(file)}")
    offers: list[Offer] = []
    for name in (file.file, *file.beside):
        try:
            found = get_hf_file_metadata(hf_hub_url(file.repo, name), timeout=20)
        except Exception as error:  # of httpx, of requests, of the hub: none is a bug of ours
            raise ConfigError(
                f"{file.repo}/{name} cannot be had from the hub ({_first_line(error)}); "
                f"{by_hand(file)}"
            ) from error
        etag = (found.etag or "").strip('"')
        sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
        offers.append(Offer(file, name, found.size or 0, sha256, found.commit_hash or "main"))
    known = file.sha256
    if known and offers[0].sha256 and offers[0].sha256 != known:
        raise ConfigError(
            f"{file.repo}/{file.file} is not the file that it should be: its sha256 is "
            f"{offers[0].sha256}, not {known}; {by_hand(file)}"
        )
    return offers


def fetch(offer: Offer, target: Path, say: Callable[[str], None]) -> Path:
    """Load a file, verify it, and put it in its place.

    Args:
        offer: from `offers_of`.
        target: the file to write; what is there is replaced only by what was verified.
        say: told what is being done.

    Returns:
        The target.

    Raises:
        ConfigError: where the disk has no room, the load fails, or the content is another.
    """
    from huggingface_hub import hf_hub_download

    file = offer.file
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < 2 * offer.size + SPARE:  # once in the hub's cache, once here
        raise ConfigError(
            f"{target} needs {2 * offer.size / 1e9:.1f} GB while it is fetched, and "
            f"{free / 1e9:.1f} GB are free; free some space or give another --folder"
        )
    partial = target.parent / f".{target.name}.parts"
    try:
        loaded = hf_hub_download(
            str(file.repo), offer.name, revision=offer.commit, local_dir=partial
        )
        wanted = (file.sha256 if offer.name == file.file else None) or offer.sha256
        say(f"verifying {target.name}")
        found = sha256_of(Path(loaded))
        if wanted is not None and found != wanted:
            raise ConfigError(
                f"{offer.name} did not arrive whole: its sha256 is {found}, not {wanted}; nothing "
                "was kept, run the command again"
            )
        with replacing(target) as fresh:
            shutil.move(loaded, fresh)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{file.repo}/{offer.name} was not loaded ({_first_line(error)}); {by_hand(file)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    told = f"sha256 {found[:16]}... " + ("verified" if wanted else "(the hub names none)")
    say(f"{target}  {told}")
    return target


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    value = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            value.update(block)
    return value.hexdigest()


def by_hand(file: WeightFile) -> str:
    """How to get a weight file without this command."""
    also = f" with {', '.join(file.beside)}" if file.beside else ""
    return (
        f"get it by hand from {file.page} and put it{also} into models/{file.folder} as {file.name}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip(": ")
