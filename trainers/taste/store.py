"""The folder of a taste: votes, pictures, head. No torch.

votes.jsonl       one line per vote or undo, appended, never changed
pairs.jsonl       pairs to vote on, likewise
offers.jsonl      pictures that pairs may be drawn from, likewise
images/           PNG files, named by the SHA-256 of their size and pixels, written once
head.safetensors  what the reward reads; taste.json says what it was fitted on, and how well
README.txt        what the folder holds

Several processes may write at once (two windows, ComfyUI and a job that trains): a line is written
by one call under a lock that the system releases however a process ends, and a line that was cut
off by a kill is passed over and reported. Readers take no lock, and read only what is new.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Generic, Literal, TypeVar

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...remedies import command
from ..errors import UserError
from ..job.files import replace_file, write_csv, write_json, write_text
from ..job.folder import JobFolder
from ..reading import check_target, named

if TYPE_CHECKING:
    from PIL import Image

HEAD, RECORD, ABOUT = "head.safetensors", "taste.json", "README.txt"
CHOICES = ("left", "right", "tie", "neither", "skip")
Choice = Literal["left", "right", "tie", "neither", "skip"]
"""Neither is good counts as a tie; a pair that is skipped is not shown again and not counted."""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=10_000)]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
README = """\
This folder holds one person's taste, for PCPO (ComfyUI-PCPO):

votes.jsonl       every vote: when, which two pictures, for which prompt, and the choice
pairs.jsonl       pairs that were drawn to be voted on
offers.jsonl      the pictures that pairs are drawn from, with their prompts
images            these pictures, complete
head.safetensors  the numbers fitted to the votes; the votes cannot be read from them
taste.json        how many votes the head was fitted to, and how well it agrees with them
cache             numbers computed from the pictures; may be deleted

Everything stays on this machine. Deleting the folder deletes all of it, the pictures too. A run
that trained on it keeps the heads that it used (the numbers, no votes and no pictures of yours).
"""


class TasteError(UserError):
    """A taste that cannot be used as asked."""


class Line(BaseModel):
    """A line of a file; fields of later versions are passed over."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    id: Id = Field(default_factory=lambda: uuid.uuid4().hex)
    time: float = Field(default_factory=time.time)


class Offer(Line):
    """A picture that may be asked about."""

    image: Digest
    prompt: Text = ""
    source: Text = ""


class Pair(Line):
    """Two pictures to choose from; `random` if they were drawn at random."""

    left: Digest
    right: Digest
    prompt: Text = ""
    random: bool = False
    source: Text = ""


class Vote(Line):
    """A choice, with the pair that it is about; the last one of a pair counts."""

    pair: Id
    left: Digest
    right: Digest
    prompt: Text = ""
    random: bool = False
    source: Text = ""
    choice: Choice


class Undo(Line):
    """Takes back the vote of this id."""

    undo: Id


L = TypeVar("L", bound=Line)


class Log(Generic[L]):
    """A file of lines that grows; what was read once is kept. Safe to use from any thread."""

    def __init__(self, path: Path, *kinds: type[L]) -> None:
        self.path, self.kinds = path, kinds
        self._reading = Lock()
        self.forget()

    def forget(self) -> None:
        """Read from the beginning again."""
        self.lines: list[L] = []
        self.faults: list[str] = []
        self._place = self._number = 0

    def read(self) -> list[L]:
        """All lines; `faults` says which were passed over."""
        with self._reading:
            try:
                with self.path.open("rb") as file:
                    if os.fstat(file.fileno()).st_size < self._place:  # replaced by a shorter one
                        self.forget()
                    file.seek(self._place)
                    new = file.read()
            except FileNotFoundError:
                self.forget()
                return []
            whole = new[: new.rfind(b"\n") + 1]  # the rest is being written, or was cut off
            self._place += len(whole)
            for raw in whole.split(b"\n")[:-1]:
                self._number += 1
                if raw.strip():
                    self._take(raw)
            return [*self.lines]

    def _take(self, raw: bytes) -> None:
        why = ""
        for kind in self.kinds:
            try:
                self.lines.append(kind.model_validate_json(raw))
                return
            except ValidationError as error:
                fault = error.errors()[0]
                field = ".".join(map(str, fault["loc"]))
                why = why or f"{field}: {fault['msg']}".removeprefix(": ")
        self.faults.append(
            f"{self.path.name} line {self._number} is damaged and left out ({why[:120]})"
        )

    def append(self, lines: Iterable[L]) -> None:
        """Add lines in one write; after a line that was cut off they begin a new one."""
        data = "".join(f"{line.model_dump_json()}\n" for line in lines).encode()
        with FileLock(self.path.with_suffix(".lock")), self.path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n":
                data = b"\n" + data
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


class Store:
    """A taste's folder, open for any number of readers and writers.

    Args:
        root: the folder.

    Raises:
        TasteError: if there is no taste in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not (self.root / ABOUT).is_file() or not (self.root / "images").is_dir():
            raise TasteError(
                f"{named(self.root)} holds no taste; make one with {command('taste', 'new', root)}"
            )
        self._votes = Log[Vote | Undo](self.root / "votes.jsonl", Vote, Undo)
        self._pairs = Log(self.root / "pairs.jsonl", Pair)
        self._offers = Log(self.root / "offers.jsonl", Offer)
        self._stood: tuple[Vote | Undo | None, list[Vote]] = None, []

    @classmethod
    def new(cls, root: str | Path) -> Store:
        """Make an empty taste; `TasteError` if the folder holds anything."""
        check_target(root, "the taste's folder", is_folder=True)
        root = Path(root)
        if root.is_dir() and os.listdir(root):
            raise TasteError(f"{named(root)} is not empty; give a folder that is not there yet")
        (root / "images").mkdir(parents=True)
        write_text(root / ABOUT, README)
        return cls(root)

    def delete(self) -> None:
        """Remove the taste with its pictures, at once for all readers."""
        doomed = self.root.with_name(f".{self.root.resolve().name}.deleted")
        shutil.rmtree(doomed, ignore_errors=True)
        with self.writing():
            os.remove(self.root / ABOUT)  # whoever writes next finds no taste
        os.replace(self.root, doomed)
        shutil.rmtree(doomed)

    # --- pictures --------------------------------------------------------------------------------

    def add_image(self, picture: Image.Image) -> str:
        """Keep a picture, and return its digest."""
        from PIL import Image

        from ...pcpo.pictures.files import eight_bit

        size, pixels = picture.size, eight_bit(picture).tobytes()
        digest = hashlib.sha256(f"{size[0]}x{size[1]}:".encode() + pixels).hexdigest()
        file = self.image_file(digest)
        if not file.is_file():
            bare = Image.frombytes("RGB", size, pixels)  # without the metadata of its file
            with self.writing(), replace_file(file) as fresh:
                bare.save(fresh, "PNG")
        return digest

    @contextmanager
    def writing(self) -> Iterator[None]:
        """A lock for whatever is written, against threads and other processes.

        `TasteError` if the taste is gone: its folder is not made again.
        """
        self._check()
        lock = FileLock(self.root / "writing.lock")
        with lock:
            if is_there := self._is_there():
                yield
        if not is_there:  # deleted while this waited for the lock, which made the folder again
            with suppress(OSError):
                os.remove(lock.lock_file)
                self.root.rmdir()
            self._check()

    def _append(self, log: Log[L], lines: Iterable[L]) -> None:
        with self.writing():
            log.append(lines)

    @property
    def made(self) -> tuple[int, int]:
        """Tells this taste from another one that was made in its place."""
        about = (self.root / ABOUT).stat()
        return about.st_ino, about.st_mtime_ns

    def image_file(self, digest: str) -> Path:
        return self.root / "images" / f"{digest}.png"

    def offer(self, pictures: Sequence[Image.Image], prompts: Sequence[str], source: str) -> None:
        """Add pictures that pairs may be drawn from, each with its prompt; one that was offered
        already is not offered again."""
        known = {(line.image, line.prompt) for line in self._offers.read()}
        lines = {}
        for picture, prompt in zip(pictures, prompts, strict=True):
            key = (self.add_image(picture), prompt)
            if key not in known:
                lines[key] = Offer(image=key[0], prompt=prompt, source=source)
        if lines:
            self._append(self._offers, lines.values())

    def offers(self) -> list[Offer]:
        """The pictures that can be asked about, the oldest first."""
        there = self._there()
        return [line for line in self._offers.read() if line.image in there]

    def count_images(self) -> int:
        """How many pictures there are."""
        return len(self._there())

    def _there(self) -> set[str]:
        try:
            return {name.removesuffix(".png") for name in os.listdir(self.root / "images")}
        except FileNotFoundError as error:
            raise TasteError(self._gone()) from error

    # --- pairs and votes -------------------------------------------------------------------------

    def put(self, pairs: Sequence[Pair]) -> None:
        """Add pairs to vote on."""
        if pairs:
            self._append(self._pairs, pairs)

    def asked(self) -> list[Pair]:
        """All pairs that were drawn."""
        return self._pairs.read()

    def waiting(self) -> list[Pair]:
        """Pairs without a vote whose pictures are there, the newest source first."""
        done, there = {vote.pair for vote in self._standing()}, self._there()
        pairs = self._pairs.read()
        found = [p for p in pairs if p.id not in done and {p.left, p.right} <= there]
        newest = {pair.source: i for i, pair in enumerate(pairs)}
        return sorted(found, key=lambda pair: -newest[pair.source])

    def pair(self, id_: str) -> Pair:
        """The pair of this id; `TasteError` if there is none."""
        self._check()
        found = next((pair for pair in reversed(self._pairs.read()) if pair.id == id_), None)
        if found is None:
            raise TasteError("the pair is not one of this taste; reload the page")
        return found

    def vote(self, pair: Pair, choice: str) -> Vote:
        """Record a choice on a pair."""
        self._check()
        if choice not in CHOICES:
            raise TasteError(f"{choice!r} is no choice; give one of {', '.join(CHOICES)}")
        about = pair.model_dump(include={"left", "right", "prompt", "random", "source"})
        vote = Vote(pair=pair.id, choice=choice, **about)  # pyright: ignore[reportArgumentType]
        self._append(self._votes, [vote])
        return vote

    def undo(self, is_mine: Callable[[Vote], bool] = lambda _: True) -> Vote | None:
        """Take back the last vote that stands and is one's own, and return it; None if there is
        none."""
        self._check()
        last = next(filter(is_mine, reversed(self._standing())), None)
        if last is not None:
            self._append(self._votes, [Undo(undo=last.id)])
        return last

    def record(self, votes: Sequence[Vote]) -> None:
        """Add votes that were made elsewhere."""
        if votes:
            self._append(self._votes, votes)

    def _standing(self) -> list[Vote]:
        """The last vote of each pair that was not taken back, in the order of their lines."""
        lines = self._votes.read()
        if lines and lines[-1] is self._stood[0]:
            return self._stood[1]
        undone = {line.undo for line in lines if isinstance(line, Undo)}
        kept: dict[str, Vote] = {}
        for line in reversed(lines):
            if isinstance(line, Vote) and line.id not in undone:
                kept.setdefault(line.pair, line)
        found = [*kept.values()][::-1]
        self._stood = lines[-1] if lines else None, found
        return found

    def votes(self) -> list[Vote]:
        """The votes that count, in the order of their lines: without those taken back, skipped, or
        about a picture that is not there; `faults` says how many of the last kind."""
        there = self._there()
        votes = [vote for vote in self._standing() if vote.choice != "skip"]
        kept = [vote for vote in votes if {vote.left, vote.right} <= there]
        self._missing = len(votes) - len(kept)
        return kept

    def faults(self) -> list[str]:
        """What is wrong with the files, one sentence each."""
        self.votes()
        logs = (self._votes, self._pairs, self._offers)
        found = [fault for log in logs for fault in (log.read(), log.faults)[1]]
        if self._missing:
            found.append(f"{self._missing} votes are about pictures that are gone, and left out")
        return found

    def _is_there(self) -> bool:
        return (self.root / ABOUT).is_file()

    def _check(self) -> None:
        if not self._is_there():
            raise TasteError(self._gone())

    def _gone(self) -> str:
        return f"the taste {named(self.root)} is gone: it was moved or deleted"

    # --- results ---------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """taste.json: what the head was fitted on, and how well; empty before the first fit."""
        found = JobFolder(self.root).read(RECORD)
        return found if {"votes", "random", "curve", "notes"} <= {*found} else {}

    def keep_result(self, result: dict[str, Any]) -> None:
        with self.writing():
            write_json(self.root / RECORD, result)

    def export(self, target: Path) -> None:
        """Copy votes, as CSV too, and the pictures that they are about."""
        votes = self.votes()
        for digest in {digest for vote in votes for digest in (vote.left, vote.right)}:
            with replace_file(target / "images" / f"{digest}.png") as fresh:
                shutil.copyfile(self.image_file(digest), fresh)
        names = ("time", "prompt", "left", "right", "choice", "random", "source")
        rows = ([getattr(vote, name) for name in names] for vote in votes)
        write_csv(target / "votes.csv", [names, *rows])
        write_text(target / "votes.jsonl", "".join(f"{v.model_dump_json()}\n" for v in votes))
