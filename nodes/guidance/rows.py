"""Several tuned versions of one network in one forward pass: each row of the batch has its own.

A batch holds rows of the base beside rows of its versions, over ONE copy of the weights: those with
the patches that all of them share. What is not shared is added to the output of each layer, to
the rows that it belongs to. No ComfyUI is imported here but in `difference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ...pcpo.row_lora import InTurn, LowRank, StackedLora, Variant
from .layers import Addition, Difference, is_affine, low_rank, resizes

Patches = dict[str, list[Any]]
"""What a ModelPatcher does to each weight, in this order."""

SHARE_OF_MEMORY = 0.25
"""Of the free memory, at most, for keeping additions where the layers are."""


def shared_patches(*patches: Patches) -> Patches:
    """What all MODELs do first, before they part.

    Returns:
        The longest common beginning of each weight's patches.
    """
    found = {}
    for key in patches[0]:
        together = zip(*(one.get(key, []) for one in patches), strict=False)
        alike = takewhile(lambda row: all(patch is row[0] for patch in row), together)
        found[key] = [row[0] for row in alike]
    return {key: shared for key, shared in found.items() if shared}


def obstacle(base: Any, tuned: Any) -> str | None:
    """Why a tuned MODEL cannot be in one batch with its base.

    Returns:
        The reason, to follow "tuned model 1 "; None where it can.
    """
    if not tuned.is_clone(base):
        return "is of another file than the base"
    if tuned.injections.keys() != base.injections.keys():
        return "is patched by something else than weights"
    for key in sorted({*tuned.patches, *base.patches}):
        theirs, ours = (one.patches.get(key, []) for one in (tuned, base))
        if len(theirs) == len(ours) and all(a is b for a, b in zip(theirs, ours, strict=True)):
            continue
        path, _, name = key.rpartition(".")
        if name not in ("weight", "bias") or not is_affine(base.model.get_submodule(path)):
            return f"changes {key}, which is of no linear, convolution or normalisation layer"
        if any(resizes(patch) for patch in [*theirs, *ours]):
            return f"changes the size of {key}"
    return None


@dataclass(slots=True)
class RowAdapters(InTurn):
    """What base and tuned versions do not share, put on the layers while the network is loaded.

    Attributes:
        shared: the patches in the network's own weights.
        low_rank: LoRAs by the layer's path and the outputs that they are for.
        whole: (key of the parameter, whose, patches beyond the shared ones) of all others.
        keeps: whether additions stay on the device of their layers, or are brought each time.
    """

    shared: Patches
    low_rank: dict[tuple[str, int, int | None], list[LowRank]] = field(default_factory=dict)
    whole: list[tuple[str, Variant, list[Any]]] = field(default_factory=list)
    keeps: bool = True
    _replaced: list[nn.Module] = field(default_factory=list)

    def add(self, variant: Variant, network: nn.Module, patches: Patches) -> None:
        """Take over what a MODEL has beyond the shared patches.

        Args:
            network: whose weights they are for.
            patches: of a MODEL without `obstacle`.
        """
        for key, mine in patches.items():
            own = mine[len(self.shared.get(key, [])) :]
            if not own:
                continue
            path, _, name = key.rpartition(".")
            layer = network.get_submodule(path)
            found = [low_rank(variant, layer, patch) for patch in own]
            plain = [one for one in found if one is not None]
            if name == "weight" and len(plain) == len(found):
                for one in plain:
                    self.low_rank.setdefault((path, one.first, one.count), []).append(one)
            else:
                self.whole.append((key, variant, own))

    def inject(self, patcher: Any) -> None:
        """Replace the forward of every layer concerned; called when the model is loaded."""
        additions = self._additions(patcher)
        size = sum(t.nbytes for found in additions.values() for one in found for t in one.tensors)
        self.keeps = size < SHARE_OF_MEMORY * patcher.get_free_memory(patcher.load_device)
        for path, found in additions.items():
            layer = patcher.model.get_submodule(path)
            layer.forward = self._forward(layer, layer.forward, found)
            self._replaced.append(layer)

    def eject(self, patcher: Any) -> None:
        """Give every layer its own forward back; called when the model is unloaded."""
        for layer in self._replaced:
            layer.__dict__.pop("forward", None)  # the instance's; the class's is seen again
        self._replaced.clear()

    def _additions(self, patcher: Any) -> dict[str, list[Addition]]:
        changed: dict[tuple[str, Variant], dict[str, Tensor]] = {}
        for key, variant, patches in self.whole:
            path, _, name = key.rpartition(".")
            value = difference(patcher, key, self.shared.get(key, []), patches)
            changed.setdefault((path, variant), {})[name] = value
        found: dict[str, list[Addition]] = {}
        for (path, *_), alike in self.low_rank.items():
            inverse = alike[::-1]  # as ComfyUI orders a batch, so that parts of a stack are views
            stack = StackedLora.of(patcher.model.get_submodule(path), inverse)
            found.setdefault(path, []).append(stack)
        for (path, variant), parts in changed.items():
            found.setdefault(path, []).append(Difference(variant, **parts))
        return found

    def _forward(
        self, layer: nn.Module, original: Callable[..., Tensor], additions: Sequence[Addition]
    ) -> Callable[..., Tensor]:
        ready: dict[int, Addition] = {}

        def kept(place: int, x: Tensor) -> Addition:
            one = ready.get(place)
            if one is None or (one.tensors[0].dtype, one.tensors[0].device) != (x.dtype, x.device):
                one = ready[place] = additions[place].like(x)
            return one

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = original(x, *args, **kwargs)
            if self.batch is None:
                return y
            if len(x) != len(self.batch):
                raise RuntimeError(
                    f"a layer met {len(x)} rows in a batch of {len(self.batch)}: this network "
                    "folds its batch, so that Implicit Reward Guidance cannot tell whose rows "
                    "they are"
                )
            for place, one in enumerate(additions):
                if self.batch.holds(one.variants):
                    (kept(place, x) if self.keeps else one)(layer, x, y, self.batch)
            return y

        return forward


@torch.no_grad()
def difference(patcher: Any, key: str, shared: list[Any], patches: list[Any]) -> Tensor:
    """What further patches change of a parameter.

    Returns:
        The change on the CPU, in the parameter's dtype, or bfloat16 where that has 8 bits or less.
    """
    import comfy.lora
    import comfy.model_patcher

    weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
    if key in patcher.backup:
        weight = patcher.backup[key].weight
    dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.bfloat16
    weight = weight.to(patcher.load_device, copy=True)
    plain = (weight if convert is None else convert(weight, inplace=True)).float()
    before = comfy.lora.calculate_weight(shared, plain, key).clone()
    return (comfy.lora.calculate_weight(patches, before.clone(), key) - before).to("cpu", dtype)
