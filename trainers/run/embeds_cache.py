"""Prompt embeddings on the disk: made once, and looked up by what they are made from.

FOLDER/README.txt
FOLDER/ab/ab34....safetensors   one prompt: its tokens and pooled vector

The name of a file is a hash of the text encoders, their precision and the prompt, so that any
number of runs may share the folder, and all of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...pcpo.finite import all_finite
from ..errors import RunError
from ..families.embeds import Embeds
from ..job.leftovers import sweep
from ..lora.safetensors_file import write_safetensors

VERSION = 1  # of how embeddings are made; another one finds no old files
NOTE = "Prompt embeddings of PCPO's training runs. They are made again where they are missing.\n"


@dataclass(frozen=True, slots=True)
class EmbedsCache:
    """Embeddings of one set of text encoders.

    Attributes:
        folder: of the files.
        identity: of the text encoders, their precision and the lengths they pad to.
        say: called with a message about a damaged file.
    """

    folder: Path
    identity: str
    say: Callable[[str], None]
    _swept: set[Path] = field(default_factory=set, compare=False)

    def file_of(self, prompt: str) -> Path:
        key = hashlib.sha256(f"{VERSION} {self.identity} {prompt}".encode()).hexdigest()
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, prompt: str) -> bool:
        """Whether there is a file of the right length; only `read` checks its contents."""
        try:
            with safe_open(self.file_of(prompt), framework="pt") as file:
                return "tokens" in file.keys()  # noqa: SIM118 (no dict)
        except FileNotFoundError:
            return False
        except (SafetensorError, OSError) as error:
            self._remove(prompt, str(error))
            return False

    def read(self, prompt: str) -> Embeds | None:
        """A prompt's embeddings, one row; None if there are none or they are damaged."""
        try:
            with safe_open(self.file_of(prompt), framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                kept = (file.metadata() or {}).get("checksum")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError) as error:
            return self._remove(prompt, str(error))
        if "tokens" not in tensors or kept != _checksum(tensors):
            return self._remove(prompt, "its checksum is another")
        if not all_finite(tensors.values()):  # of an earlier version
            return self._remove(prompt, "it is not finite")
        return Embeds(tensors["tokens"], tensors.get("pooled"))

    def write(self, prompt: str, embeds: Embeds) -> None:
        """Keep a prompt's embeddings, one row; other processes may do the same at the same time."""
        note = self.folder / "README.txt"
        if not note.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            note.write_text(NOTE, encoding="utf-8")
        place = self.file_of(prompt).parent
        if place not in self._swept and place.is_dir():
            self._swept.add(place)
            sweep(place, is_deep=False)
        pooled = {} if embeds.pooled is None else {"pooled": embeds.pooled}
        tensors = {"tokens": embeds.tokens, **pooled}
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        write_safetensors(tensors, self.file_of(prompt), {"checksum": _checksum(tensors)})

    def _remove(self, prompt: str, why: str) -> None:
        self.say(f"cached embeddings of {prompt[:40]!r} are damaged ({why}): they are made again")
        self.file_of(prompt).unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for key, tensor in sorted(tensors.items()):
        words = tensor.contiguous().flatten().view(torch.uint8)
        value = zlib.crc32(words.numpy().tobytes(), zlib.crc32(key.encode(), value))
    return f"{value:08x}"


@dataclass(frozen=True, slots=True)
class StoredEmbeds:
    """Embeddings that stay on the disk until they are indexed; rows are prompts.

    Attributes:
        cache: of their files.
        prompts: of the rows.
    """

    cache: EmbedsCache
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: list[int]) -> Embeds:
        """Read rows; `RunError` if one is gone or damaged since the run began."""
        by_row: dict[int, Embeds] = {}
        for row in dict.fromkeys(rows):
            if (embeds := self.cache.read(self.prompts[row])) is None:
                raise RunError(
                    f"the embeddings of {self.prompts[row][:40]!r} are gone from "
                    f"{self.cache.folder}; resume the run, which makes them again"
                )
            by_row[row] = embeds
        return Embeds.joined([by_row[row] for row in rows])
