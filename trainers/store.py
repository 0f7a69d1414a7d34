"""Where trajectories wait for the update, and how a micro-batch is pulled from there.

On a small card they wait in main memory; what a micro-batch needs is gathered into pinned memory
and copied while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .families.embeds import Embeds, SharedEmbeds

SMALL_CARD = 32 << 30
"""Bytes of a device below which what waits, waits in main memory."""


def is_small(device: torch.device) -> bool:
    """Whether a device is a card with less memory than `SMALL_CARD`."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).total_memory < SMALL_CARD


def waiting_place(choice: str, device: torch.device) -> torch.device:
    """Where trajectories wait.

    Args:
        choice: `run.store_on`: "auto", "device" or "cpu".
        device: that trains.

    Returns:
        The CPU or the device.
    """
    in_main_memory = choice == "cpu" or (choice == "auto" and is_small(device))
    return torch.device("cpu") if in_main_memory else device


_T = TypeVar("_T", Tensor, Embeds)


def pulled(rows: _T, device: torch.device) -> _T:
    """Rows on a device, without waiting for it.

    Args:
        rows: on the device already, or in main memory.
        device: where to.

    Returns:
        The rows.
    """
    if device.type == "cuda" and rows.device.type == "cpu":
        rows = rows.pin_memory()
    return rows.to(device, non_blocking=True)


def parked(rows: Tensor, place: torch.device) -> Tensor:
    """Rows where they wait, without waiting for the device.

    Args:
        rows: on the device.
        place: where to; main memory is pinned.

    Returns:
        The rows, to be `pulled` back.
    """
    if rows.device.type == "cuda" and place.type == "cpu":
        waiting = torch.empty_like(rows, device=place, pin_memory=True)
        return waiting.copy_(rows, non_blocking=True)
    return rows.to(place)


def shared(embeds: Any, prompts: Sequence[int], place: torch.device) -> SharedEmbeds:
    """The embeddings of images, each prompt's once.

    Args:
        embeds: of all prompts; rows are asked for by a list.
        prompts: of each image.
        place: where they wait.

    Returns:
        One row an image.
    """
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    row = torch.tensor([distinct[prompt] for prompt in prompts])
    return SharedEmbeds(embeds[list(distinct)].to(place), row.to(place))
