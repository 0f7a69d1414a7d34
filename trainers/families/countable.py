"""How the networks of a family are made and called, so that a pass can be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    @classmethod
    def by_layers(
        cls, kind: Any, fields: Sequence[str], call: Callable[..., Tensor], load: Callable[..., Any]
    ) -> Countable:
        """Networks whose blocks some fields of diffusers' config count.

        Args:
            kind: diffusers' class of them.
            fields: of its config, one by kind of block.
            call: as above.
            load: as above.
        """

        def make(config: dict[str, Any], depth: Depth) -> nn.Module:
            return kind.from_config(config | dict(zip(fields, depth, strict=False)))

        return cls(lambda config: tuple(config[name] for name in fields), make, call, load)
