"""Where trajectories wait for the update, and how a micro-batch is fetched from there.

On a small card they wait in main memory; what a micro-batch needs is gathered into pinned memory
and copied while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..families.embeds import Embeds, SharedEmbeds
from .devices import memory_of

SMALL_CARD = 32 << 30
"""Bytes of a device below which trajectories wait in main memory."""


def is_small(device: torch.device) -> bool:
    memory = memory_of(device)
    return memory is not None and memory < SMALL_CARD


def waiting_place(choice: str, device: torch.device) -> torch.device:
    """Where trajectories wait: on the CPU or the training device, by `run.store_on`."""
    in_main_memory = choice == "cpu" or (choice == "auto" and is_small(device))
    return torch.device("cpu") if in_main_memory else device


_T = TypeVar("_T", Tensor, Embeds)


def copy_to_device(rows: _T, device: torch.device) -> _T:
    """Copy rows to a device, without waiting for it."""
    if device.type == "cuda" and rows.device.type == "cpu":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


def copy_to_store(rows: Tensor, place: torch.device) -> Tensor:
    """Copy rows to where they wait, without waiting for the device; main memory is pinned."""
    if rows.device.type == "cuda" and place.type == "cpu":
        waiting = torch.empty_like(rows, device=place, pin_memory=True)
        return waiting.copy_(rows, non_blocking=True)
    return rows.to(place)


def share_embeds(
    embeds: Any, prompts: Sequence[int], place: torch.device, sizes: Tensor | None = None
) -> SharedEmbeds:
    """The embeddings of images, each prompt's once.

    Args:
        embeds: of all prompts, indexed by a list of rows.
        place: where they wait.
        sizes: that each image is told, if it has its own.
    """
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    row = torch.tensor([distinct[prompt] for prompt in prompts])
    told = None if sizes is None else sizes.to(place)
    return SharedEmbeds(embeds[list(distinct)].to(place), row.to(place), told)
