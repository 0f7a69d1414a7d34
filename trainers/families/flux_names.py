"""The layers of FLUX.1's and FLUX.2's networks: their original names, and those in diffusers.

The original fuses q, k and v into one layer, which in single blocks also holds the first layer of
the MLP, and its last modulation gives the shift first, where diffusers' gives the scale first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from .assemble import number_of_blocks, swap_halves

SWAPPED = "final_layer.adaLN_modulation.1"

Rows = Mapping[str, tuple[str, ...]]
"""A layer of a block, and what its rows are in diffusers, from the first to the last."""
_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class FluxNames:
    """The names of one family.

    Attributes:
        top: layers outside blocks, and diffusers' name of each.
        double: layers of a double block.
        single: layers of a single block.
    """

    top: Mapping[str, str]
    double: Rows
    single: Rows

    def in_diffusers(self, module: str) -> tuple[str, ...]:
        """The modules of diffusers' network, in order, that an original layer's rows belong to."""
        if module in self.top:
            return (self.top[module],)
        match = _BLOCK.fullmatch(module)
        if match is None:
            return ()
        kind, index, layer = match.groups()
        table, folder = (self.double, "") if kind == "double" else (self.single, "single_")
        return tuple(f"{folder}transformer_blocks.{index}.{name}" for name in table.get(layer, ()))

    def original_layers(
        self, modules: Iterable[str]
    ) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """The original layers of a network, the modules that their rows are in diffusers, and
        whether the halves of the rows stand the other way round there; `modules` are those of
        diffusers.
        """
        depth = number_of_blocks(modules)
        layers = [f"double_blocks.{i}.{layer}" for i in range(depth) for layer in self.double]
        layers += [f"single_blocks.{i}.{layer}" for i in range(depth) for layer in self.single]
        for layer in [*self.top, *layers]:
            yield layer, self.in_diffusers(layer), layer == SWAPPED

    def to_diffusers(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the network's tensors to diffusers' names; parts of fused ones are views.

        Unknown names are kept: those of diffusers are right already, and others are reported when
        the network is filled.
        """
        out: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            module, _, kind = key.rpartition(".")
            names = self.in_diffusers(module)
            if not names:
                out[key] = tensor
                continue
            if module == SWAPPED:
                tensor = swap_halves(tensor)
            kind = "weight" if kind == "scale" else kind
            parts = _parts(tensor, len(names), tensors) if len(names) > 1 else (tensor,)
            out |= {f"{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
        return out


def _parts(fused: Tensor, count: int, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    width = len(tensors["img_in.weight"])
    rest = [len(fused) - 3 * width] if count > 3 else []  # of the MLP
    return fused.split([width] * 3 + rest)
