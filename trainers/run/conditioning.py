"""Prompt embeddings of a run: read from the disk, or encoded before the network is loaded.

The text encoders are loaded alone, if some prompt is not on the disk yet, and are gone before the
network is read: the two never share the memory of a device.

FOLDER/README.txt
FOLDER/ab/ab34....safetensors   one prompt: its tokens and pooled vector

The name of a file is a hash of the text encoders, their precision and the prompt, so that any
number of runs may share the folder, and all of it may be deleted at any time.
"""

from __future__ import annotations

import gc
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...pcpo.finite import all_finite
from ..config.train_config import ConfigError, TrainConfig
from ..errors import RunError
from ..families import Family, inspect_source
from ..families.embeds import Embeds, SharedEmbeds
from ..families.identity import text_identity
from ..families.registry import FAMILIES
from ..families.text.tokenizers import qwen_in_hub_cache, t5_in_hub_cache
from ..job.cache_folder import cache_folder
from ..job.leftovers import sweep
from ..job.preflight import files_of
from ..job.prompts import chosen_prompts
from ..lora.safetensors_file import write_safetensors
from .method import DTYPES
from .phases import phase

VERSION = 1  # of how embeddings are made; another one finds no old files
NOTE = "Prompt embeddings of PCPO's training runs. They are made again where they are missing.\n"
TOGETHER = 8
"""Prompts of a batch, always: a prompt's embedding must not depend on its neighbours."""
ALL = 1000
"""Up to this number all prompts are encoded at once; of more, only those that the run needs."""
TOLD = 100 << 20
"""Bytes of fresh embeddings beyond which their size is said."""
IN_MEMORY = 2 << 30
"""Bytes of embeddings beyond which they stay on the disk."""

Say = Callable[[str], None]
Keep = Callable[[str, Embeds], Embeds]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """A run's prompts as the network takes them.

    Attributes:
        embeds: of the training prompts, then of the held-out ones.
        negative: of the negative prompt, one row.
    """

    embeds: SharedEmbeds | StoredEmbeds
    negative: Embeds


@phase("text")
def load_conditioning(
    config: TrainConfig,
    prompts: Sequence[str],
    held_out: Sequence[str],
    load: Callable[[], Family],
    say: Say,
) -> Conditioning:
    """Find or make the embeddings of a run, on the CPU or on the disk.

    Args:
        load: loads the model's text encoders onto the device; not called if all prompts are on the
            disk.
        say: called with what is done.
    """
    negative = config.sampler.negative_prompt
    needed = list(dict.fromkeys([*_asked_for(config, prompts), *held_out, negative]))
    cache = cache_of(config, say)
    keep = _keeper(config, cache, say)
    missing = [prompt for prompt in needed if cache is None or not cache.has(prompt)]
    made: dict[str, Embeds] = {}
    if missing:
        made = _encode(load, [*prompts, *held_out, negative], missing, keep, say)
    if cache is not None and _is_large(cache, needed):
        stored = StoredEmbeds(cache, (*prompts, *held_out, negative))
        return Conditioning(stored, stored[[len(stored) - 1]])
    encoded = {prompt: made.get(prompt) or _read(cache, prompt) for prompt in needed}
    damaged = [prompt for prompt, embeds in encoded.items() if embeds is None]
    if damaged:
        encoded |= _encode(load, damaged, damaged, keep, say)
    rows = {prompt: row for row, prompt in enumerate(encoded)}
    table = Embeds.concatenate([embeds for embeds in encoded.values() if embeds is not None])
    row = torch.tensor([rows.get(prompt, len(rows)) for prompt in [*prompts, *held_out]])
    return Conditioning(SharedEmbeds(table, row), table[[rows[negative]]])


def _asked_for(config: TrainConfig, prompts: Sequence[str]) -> Sequence[str]:
    """All prompts, or only those of the run's iterations if there are very many."""
    if len(set(prompts)) <= ALL:
        return prompts
    seed, count = config.run.seed, len(prompts)
    rows = [
        row
        for iteration in range(config.run.iterations)
        for row in chosen_prompts(config.prompts, count, seed, iteration)
    ]
    return [prompts[row] for row in dict.fromkeys(rows)]


def cache_of(config: TrainConfig, say: Say) -> EmbedsCache | None:
    """The cache of a run's embeddings; None if they are not to be kept."""
    folder = cache_folder(config.run.cache)
    if folder is None:
        return None
    model, files = config.model, files_of(config.model)
    spec = FAMILIES.get(inspect_source(files.network).family or "")
    has_qwen = spec is not None and "qwen_tokenizer" in spec.options
    tokenizers = (t5_in_hub_cache(), *([qwen_in_hub_cache()] if has_qwen else []))
    identity = text_identity(files, *tokenizers)
    read = f"{dtype_of(config)} {model.t5_length} {model.clip_skip}"
    return EmbedsCache(folder, f"{identity} {read}", say)


def dtype_of(config: TrainConfig) -> torch.dtype:
    """The dtype that the network is loaded in and takes embeddings in."""
    return torch.float32 if config.trainable.kind == "full" else DTYPES[config.model.precision]


def _read(cache: EmbedsCache | None, prompt: str) -> Embeds | None:
    return None if cache is None else cache.read(prompt)


def _is_large(cache: EmbedsCache, needed: Sequence[str]) -> bool:
    """Whether embeddings are all on the disk and better left there."""
    first = cache.read(needed[0])
    if first is None or len(needed) * first.nbytes <= IN_MEMORY:
        return False
    return all(cache.has(prompt) for prompt in needed)


def _keeper(config: TrainConfig, cache: EmbedsCache | None, say: Say) -> Keep:
    """A function that rounds fresh embeddings to the network's dtype and keeps them."""
    dtype, can_write = dtype_of(config), cache is not None

    def keep(prompt: str, embeds: Embeds) -> Embeds:
        nonlocal can_write
        embeds = embeds.to(dtype)
        Embeds.from_encoder([prompt], embeds.tokens, embeds.pooled)  # finite when rounded?
        if cache is not None and can_write:
            try:
                cache.write(prompt, embeds)
            except OSError as error:
                can_write = False
                say(f"prompt embeddings cannot be kept in {cache.folder} ({error}); going on")
        return embeds

    return keep


@torch.no_grad()
def _encode(
    load: Callable[[], Family],
    every: Sequence[str],
    missing: Sequence[str],
    keep: Keep,
    say: Say,
) -> dict[str, Embeds]:
    """Embeddings of prompts that are not on the disk; the text encoders are gone afterwards.

    If they are too many for memory they are on the disk alone.
    """
    family = load()
    check_lengths(family, every)
    say(f"encoding {len(missing)} prompts")
    made: dict[str, Embeds] = {}
    held = 0
    for start in range(0, len(missing), TOGETHER):
        batch = list(missing[start : start + TOGETHER])
        filled = batch + batch[-1:] * (TOGETHER - len(batch))
        embeds = family.encode(filled).to("cpu")
        fresh = {p: keep(p, embeds[i : i + 1].trim()) for i, p in enumerate(batch)}
        held += sum(embeds.nbytes for embeds in fresh.values())
        made = {} if held > IN_MEMORY else made | fresh
    if held > TOLD:
        say(f"the embeddings of {len(missing)} prompts take {held / 1e9:.1f} GB")
    family.release_text_encoder()
    del family
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return made


def check_lengths(family: Family, prompts: Sequence[str]) -> None:
    """Refuse prompts longer than the text encoder takes."""
    for prompt in dict.fromkeys(prompts):
        if (length := family.prompt_length(prompt)) > family.max_prompt_length:
            raise ConfigError(
                f"a prompt has {length} tokens and the model takes {family.max_prompt_length}; "
                f"shorten it, or the end would be trained on unseen: {prompt[:60]!r}..."
            )


# --- on the disk ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EmbedsCache:
    """Embeddings of one set of text encoders.

    Attributes:
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
        return Embeds(tensors["tokens"], tensors.get("pooled"), lengths=tensors.get("lengths"))

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
        parts = {"tokens": embeds.tokens, "pooled": embeds.pooled, "lengths": embeds.lengths}
        tensors = {key: t.cpu().contiguous() for key, t in parts.items() if t is not None}
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
    """Embeddings that stay on the disk until they are indexed; rows are prompts."""

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
        return Embeds.concatenate([by_row[row] for row in rows])
