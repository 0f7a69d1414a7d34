"""How the networks of a family are made and called, so that a pass can be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Depth = tuple[int, ...]
"""The number of a network's blocks, by kind; empty for one that is counted whole."""


@dataclass(frozen=True, slots=True)
class Countable:
    """The networks of a family.

    Attributes:
        depth: the blocks of a config.
        make: makes a network of some depth; of the config's own if it is empty.
        call: its output for a batch of images of a side in tokens, and prompts of some length.
        load: a network without its weights, from an opened file; None if all are alike.
    """

    depth: Callable[[Mapping[str, Any]], Depth]
    make: Callable[[dict[str, Any], Depth], nn.Module]
    call: Callable[[Any, int, int, int], Tensor]
    load: Callable[..., Any] | None
