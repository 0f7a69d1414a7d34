"""Download weights from the hub or from their makers' pages: query, load, verify, put in place."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm

from ...pcpo.pretrained import fetch as transfer
from ...pcpo.pretrained.catalogue import WeightFile
from ..config.train_config import ConfigError

TIMEOUT = 20
"""Seconds in which a server has to answer."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A file as the hub, or its maker's server, offers it now.

    Attributes:
        name: its path in the repository; its address if it is not on the hub.
        size: in bytes.
        sha256: of its content; None if the hub does not say.
        commit: of the repository; empty if there is none.
    """

    file: WeightFile
    name: str
    size: int
    sha256: str | None
    commit: str

    @property
    def source(self) -> str:
        """Its origin, for the user."""
        return f"{self.file.repo}/{self.name}" if self.commit else self.name

    @property
    def url(self) -> str:
        """Its address."""
        from huggingface_hub import hf_hub_url

        if not self.commit:
            return self.name
        return hf_hub_url(str(self.file.repo), self.name, revision=self.commit)

    @property
    def is_wanted(self) -> bool:
        """Whether it is the file itself, and not one that lies beside it."""
        return self.name in (self.file.file, self.file.url)


def offers_of(file: WeightFile) -> list[Offer]:
    """What to load for a weight file: itself first, then what has to lie beside it.

    Raises:
        ConfigError: if nobody has it, there is no network, or the hub has another file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if file.url is not None:
        return [_offer_at(file, file.url)]
    if file.repo is None or file.file is None:
        raise ConfigError(f"{file.name} is not on the hub; {by_hand(file)}")
    offers: list[Offer] = []
    for name in (file.file, *file.beside):
        try:
            metadata = get_hf_file_metadata(hf_hub_url(file.repo, name), timeout=TIMEOUT)
        except Exception as error:  # of httpx, of requests, of the hub: none is a bug of ours
            raise ConfigError(
                f"{file.repo}/{name} cannot be had from the hub ({_first_line(error)}); "
                f"{by_hand(file)}"
            ) from error
        etag = (metadata.etag or "").strip('"')
        sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
        offers.append(Offer(file, name, metadata.size or 0, sha256, metadata.commit_hash or "main"))
    known = file.sha256
    if known and offers[0].sha256 and not offers[0].sha256.startswith(known):
        raise ConfigError(
            f"{file.repo}/{file.file} is not the file that it should be: its sha256 is "
            f"{offers[0].sha256}, not {known}; {by_hand(file)}"
        )
    return offers


def _offer_at(file: WeightFile, url: str) -> Offer:
    """What a server offers at an address; `ConfigError` if it does not answer, or has nothing
    there.
    """
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{url} cannot be had ({_first_line(error)}); {by_hand(file)}") from error
    return Offer(file, url, size, None, "")


def fetch(offer: Offer, target: Path, say: Callable[[str], None]) -> Path:
    """Load a file, verify it, and put it in its place; what has arrived is kept if it breaks off.

    Raises:
        ConfigError: if the disk is full, the load fails, or the content differs.
    """
    wanted = (offer.file.sha256 if offer.is_wanted else None) or offer.sha256
    with tqdm(total=offer.size, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:

        def watch(state: str, done: int, size: int) -> None:
            bar.total = size
            bar.update(done - bar.n)

        try:
            digest = transfer.fetch(offer.url, target, offer.size, wanted, watch)
        except transfer.NotFetched as error:
            raise ConfigError(
                f"{offer.source} was not loaded. {error} Or {by_hand(offer.file)}"
            ) from error
    told = f"sha256 {digest[:16]}... " + ("verified" if wanted else "(the hub names none)")
    say(f"{target}  {told}")
    return target


def by_hand(file: WeightFile) -> str:
    """How to get a weight file without this command."""
    also = f" with {', '.join(file.beside)}" if file.beside else ""
    return (
        f"get it by hand from {file.page} and put it{also} into models/{file.folder} as {file.name}"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".strip(": ")
