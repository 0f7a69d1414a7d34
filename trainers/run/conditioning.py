"""Prompt embeddings of a run: read from the disk, or encoded before the network is loaded.

The text encoders are loaded alone, if some prompt is not on the disk yet, and are gone before the
network is read: the two never share the memory of a device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..config.train_config import ConfigError, TrainConfig
from ..families import Family
from ..families.embeds import Embeds, SharedEmbeds
from ..families.identity import text_identity
from ..families.text.tokenizers import t5_in_hub_cache
from ..job.cache_folder import cache_folder
from ..job.preflight import files_of
from ..job.prompts import chosen_prompts
from .embeds_cache import EmbedsCache, StoredEmbeds
from .method import DTYPES

TOGETHER = 8
"""Prompts of a batch, always: a prompt's embedding must not depend on its neighbours."""
ALL = 1000
"""Up to this number all prompts are encoded at once; of more, only those that the run needs."""
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


def conditioning(
    config: TrainConfig,
    prompts: Sequence[str],
    held_out: Sequence[str],
    load: Callable[[], Family],
    say: Say,
) -> Conditioning:
    """Find or make the embeddings of a run, on the CPU or on the disk.

    Args:
        config: of the run.
        prompts: to train with.
        held_out: of the comparison.
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
        made = _encoded(load, [*prompts, *held_out, negative], missing, keep, say)
    if cache is not None and _is_large(cache, needed):
        stored = StoredEmbeds(cache, (*prompts, *held_out, negative))
        return Conditioning(stored, stored[[len(stored) - 1]])
    encoded = {prompt: made.get(prompt) or _read(cache, prompt) for prompt in needed}
    damaged = [prompt for prompt, embeds in encoded.items() if embeds is None]
    if damaged:
        encoded |= _encoded(load, damaged, damaged, keep, say)
    rows = {prompt: row for row, prompt in enumerate(encoded)}
    table = Embeds.joined([embeds for embeds in encoded.values() if embeds is not None])
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
    identity = text_identity(files_of(config.model), t5_in_hub_cache())
    model = config.model
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
        Embeds.checked([prompt], embeds.tokens, embeds.pooled)  # rounding may be too much for one
        if cache is not None and can_write:
            try:
                cache.write(prompt, embeds)
            except OSError as error:
                can_write = False
                say(f"prompt embeddings cannot be kept in {cache.folder} ({error}); going on")
        return embeds

    return keep


@torch.no_grad()
def _encoded(
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
        fresh = {p: keep(p, embeds[i : i + 1]) for i, p in enumerate(batch)}
        held += sum(embeds.nbytes for embeds in fresh.values())
        made = {} if held > IN_MEMORY else made | fresh
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
